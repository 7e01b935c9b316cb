"""VidCom² by its code: likenesses, the shares of frames, what stays of each; and exact budgets."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch.nn.functional import normalize

from winnow.core.errors import WinnowError
from winnow.core.layout import Layout
from winnow.core.plan import Plan
from winnow.core.view import View
from winnow.methods.vidcom2 import VidCom2
from winnow.testing import Picture

from .stubs import STUBS, ids, tokens

T, H, W = 5, 4, 6
P = H * W


def released(keep, **more):
    (method,) = Plan.of(f"vidcom2:released,keep={keep}").methods
    return method.replace(**more)


def clip(seed=0, b=1, d=24, t=T):
    """Frames that differ: each has a mean of its own, and its own spread around it."""
    noise = tokens(seed, t * P, d, b).unflatten(1, (t, P))
    means = 3 * tokens(seed + 1, t, d, b)[:, :, None]
    spread = torch.linspace(0.3, 1.5, t)[None, :, None, None]
    return View.of((means + spread * noise).flatten(1, 2), layout=Layout.grid(H, W, t))


def as_in_the_code(x, t, base, temperature=0.01, channels=0.5):
    """The indices of the code for `[t · p, D]`, frame by frame, in float64."""
    x = x.double()
    n, d = x.shape
    spread = [sum((value - float(x[:, c].mean())) ** 2 for value in x[:, c].tolist()) / n for c in range(d)]
    steady = sorted(range(d), key=lambda c: spread[c])[: int(d * channels)]
    frames = normalize(x[:, steady], dim=-1).unflatten(0, (t, -1))
    video, p = frames.flatten(0, 1).mean(0), n // t

    def like(token, centre):
        distance = float((token - centre).square().sum())
        return sum(2.718281828459045 ** (-distance / (2 * 2.0**power)) for power in (-3, -2, -1, 0, 1))

    to_video = [[like(token, video) for token in frame] for frame in frames]
    score = [-sum(row) / p for row in to_video]
    powers = [2.718281828459045 ** ((s - max(score)) / temperature) for s in score]
    shares = [power / sum(powers) for power in powers]
    kept = []
    for f, frame in enumerate(frames):
        ratio = min(1.0, base * (1 + shares[f] - sum(shares) / t))
        both = [to_video[f][j] + like(frame[j], frame.mean(0)) for j in range(p)]
        kept += [f * p + j for j in sorted(sorted(range(p), key=lambda j: both[j])[: max(1, round(ratio * p))])]
    return kept


@pytest.mark.system("vidcom2", "exact")
@pytest.mark.parametrize("keep", ["10%", "15%", "25%", "60%"])
@pytest.mark.parametrize("temperature", [0.01, 0.3])
def test_as_released_it_keeps_what_the_code_keeps(keep, temperature):
    method = released(keep, temperature=temperature)
    for seed in range(4):
        view = clip(seed)
        wanted = as_in_the_code(view.tokens[0], T, float(keep.rstrip("%")) / 100, temperature)
        assert ids(method.reduce(view)) == wanted


@pytest.mark.parametrize("stub", STUBS)
def test_the_code_tells_a_stub(stub):
    view = clip()
    wanted = as_in_the_code(view.tokens[0], T, 0.25)
    assert ids(stub(view, len(wanted))) != wanted


def of_frames(found, t=T):
    return torch.tensor(ids(found)).div(P, rounding_mode="floor").bincount(minlength=t).tolist()


@pytest.mark.system("vidcom2", "exact")
@pytest.mark.parametrize("keep", [1, 7, 30, "25%", "99%", "100%"])
def test_the_item_keeps_exactly_its_budget(keep):
    for seed in range(3):
        view = clip(seed)
        assert VidCom2(keep=keep).reduce(view).m == VidCom2(keep=keep).keep.of(view)


def test_within_a_frame_exact_and_released_rank_alike():
    """A frame of which both keep as many keeps the same."""
    view = clip(2)
    exact, code = VidCom2(keep="25%").reduce(view), released("25%").reduce(view)
    same = [t for t, (a, b) in enumerate(zip(of_frames(exact), of_frames(code), strict=True)) if a == b]
    assert same
    for t in same:
        own = set(range(t * P, (t + 1) * P))
        assert own & set(ids(exact)) == own & set(ids(code))


def odd_one_out(at=3):
    """Frames that repeat one another but for one, in which a block of tokens is new."""
    still = 1 + 0.2 * tokens(0, P)[0]
    frames = (still + 0.01 * tokens(1, T * P)[0].unflatten(0, (T, P))).clone()
    new = [W + 1, W + 2, 2 * W + 1, 2 * W + 2]
    frames[at, new] = 2 * tokens(2, 1)[0, 0] + 0.2 * tokens(3, 4)[0]
    view = View.of(frames.flatten(0, 1)[None], layout=Layout.grid(H, W, T))
    return view, {at * P + j for j in new}


def finds_the_odd_one(reduce):
    view, new = odd_one_out()
    k = T * P // 5
    found = reduce(view, k)
    assert new <= set(ids(found))
    counts = of_frames(found)
    assert counts[3] == max(counts) > min(counts)


@pytest.mark.system("vidcom2", "directional")
def test_the_frame_that_is_unlike_the_others_keeps_more_and_what_is_new_in_it():
    finds_the_odd_one(lambda view, k: VidCom2(keep=k).reduce(view))


@pytest.mark.parametrize("stub", STUBS)
def test_the_odd_frame_tells_a_stub(stub):
    with pytest.raises(AssertionError):
        finds_the_odd_one(stub)


def test_a_picture_is_one_frame():
    for layout in (Layout.grid(6, 8), Picture.tiled(4, 2, 1).lm):
        view = View.of(tokens(0, 48), layout=layout)
        assert ids(VidCom2(keep=12).reduce(view)) == as_in_the_code(view.tokens[0], 1, 0.25)


def test_what_an_earlier_method_left_is_all_there_is():
    """Means, shares and ranks are of the tokens that are left."""
    view, rest = clip(1), [j for j in range(T * P) if j % 3]
    part = replace(view, tokens=view.tokens[:, rest], ids=torch.tensor(rest)[None])
    layout = Layout.grid(H, W // 3 * 2, T)
    alone = View.of(part.tokens, layout=layout)
    method = VidCom2(keep=20, temperature=0.1)
    assert ids(method.reduce(part)) == ids(method.reduce(alone))


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_broken_tokens_are_counted_and_change_nothing_for_others(value):
    view = clip(4)
    view.tokens[0, [2, P + 7]] = value
    found = VidCom2(keep=T * P - 2).reduce(view)
    assert not {2, P + 7} & set(ids(found))
    assert int(view.notes["nan_scores"]) == 2


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("exact", [True, False])
def test_half_precision_is_computed_in_fp32(dtype, exact):
    view = clip(3, b=2)
    half = replace(view, tokens=view.tokens.to(dtype))
    wide = replace(view, tokens=half.tokens.float())
    a, b = (VidCom2(keep="30%", exact=exact).reduce(v) for v in (half, wide))
    assert [ids(a, i) for i in (0, 1)] == [ids(b, i) for i in (0, 1)]


@pytest.mark.parametrize("exact", [True, False])
def test_a_batch_is_its_items_alone(exact):
    view, method = clip(5, b=3, d=33), VidCom2(keep="30%", exact=exact)
    together = method.reduce(view)
    for i in range(3):
        assert ids(together, i) == ids(method.reduce(View.of(view.tokens[i : i + 1], layout=view.layout)))


@pytest.mark.parametrize(("name", "value"), [("keep", 1.5), ("temperature", 0), ("channels", 0), ("exact", 2)])
def test_bad_settings_say_what_is_allowed(name, value):
    with pytest.raises(WinnowError, match=name):
        VidCom2(**{name: value})
