"""EVS by its card: counts that follow from the shape, the first frame, what moves, and the code's mask."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from winnow.core.errors import WinnowError
from winnow.core.layout import Layout
from winnow.core.plan import Plan
from winnow.core.view import View
from winnow.methods.evs import EVS
from winnow.testing import Picture

from .stubs import STUBS, ids, tokens

T, H, W = 6, 4, 5
P = H * W


def released(keep):
    (method,) = Plan.of(f"evs:released,keep={keep}").methods
    return method


def clip(seed=0, t=T, h=H, w=W, b=1, d=16):
    return View.of(tokens(seed, t * h * w, d, b), layout=Layout.grid(h, w, t))


def as_in_the_code(x, t, q):
    """The mask of the code for `[t · p, D]`: a stable order of 1 − cosine, the first frame at 255."""
    p = len(x) // t
    change = [255.0] * p
    for j in range(p, len(x)):
        change.append(float(1 - torch.cosine_similarity(x[j], x[j - p], dim=0)))
    order = sorted(range(len(x)), key=lambda j: -change[j])
    return sorted(order[: max(p, int(len(x) * (1 - q)))])


@pytest.mark.system("evs", "exact")
@pytest.mark.parametrize("q", [0.0, 0.3, 0.5, 0.7, 0.75, 0.9, 0.99])
def test_as_released_it_keeps_what_the_code_keeps(q):
    keep = f"{round(100 * (1 - q), 6):g}%"
    for seed in range(4):
        view = clip(seed)
        assert ids(released(keep).reduce(view)) == as_in_the_code(view.tokens[0], T, q)


@pytest.mark.system("evs", "exact")
@given(st.integers(1, 9), st.integers(1, 5), st.integers(1, 6), st.integers(0, 99))
def test_the_count_follows_from_the_shape(t, h, w, percent):
    """As the code counts it, floats and all: 100 tokens pruned by 0.9 are 9, not 10."""
    q = percent / 100
    view, n = clip(0, t, h, w, d=2), h * w
    keep = f"{100 - percent}%"
    assert released(keep).reduce(view).m == max(n, int(t * n * (1 - q)))
    assert EVS(keep=keep).reduce(view).m == max(1, math.floor(t * n * (100 - percent) / 100 + 1e-9))


def test_a_count_is_a_count():
    assert EVS(keep=7).reduce(clip()).m == 7
    assert released(7).reduce(clip()).m == P
    assert released(P + 7).reduce(clip()).m == P + 7


@pytest.mark.system("evs", "exact")
def test_as_much_as_a_frame_is_the_first_frame():
    assert ids(released("1%").reduce(clip())) == list(range(P))
    assert ids(EVS(keep=P).reduce(clip())) == list(range(P))
    assert ids(EVS(keep="100%").reduce(clip())) == list(range(T * P))


def moving():
    """A still background over which one token moves by a place from frame to frame, in the second row."""
    background, patch = tokens(1, P)[0], tokens(2, 1)[0, 0]
    frames = background.repeat(T, 1, 1)
    for t in range(T - 1):
        frames[t, W + t] = patch
    frames[T - 1, W + T - 2] = patch
    return View.of(frames.reshape(1, T * P, -1), layout=Layout.grid(H, W, T))


def old_and_new():
    """Where the picture changes: the place that the patch leaves, and the one it comes to."""
    return {t * P + W + place for t in range(1, T - 1) for place in (t - 1, t)}


def keeps_what_moves(reduce):
    for k in range(P, P + len(old_and_new()) + 1):
        kept = set(ids(reduce(moving(), k)))
        assert kept >= set(range(P))
        assert kept - set(range(P)) <= old_and_new()
        assert len(kept) == k


@pytest.mark.system("evs", "exact")
def test_beyond_the_first_frame_the_places_stay_that_change():
    keeps_what_moves(lambda view, k: EVS(keep=k).reduce(view))


@pytest.mark.parametrize("stub", STUBS)
def test_what_moves_tells_a_stub(stub):
    with pytest.raises(AssertionError):
        keeps_what_moves(stub)


def patch_recall(reduce, k):
    """The share of frames in which the moving token is seen, where the budget is `k`."""
    kept = set(ids(reduce(moving(), k)))
    return sum(t * P + W + t in kept for t in range(1, T - 1)) / (T - 2)


@pytest.mark.system("evs", "directional")
def test_the_moving_patch_is_kept_more_often_than_by_even_sampling():
    k = P + 2 * (T - 2)
    assert patch_recall(lambda view, k: EVS(keep=k).reduce(view), k) == 1
    for stub in STUBS:
        assert patch_recall(stub, k) <= 0.5


def test_of_equal_changes_the_earliest_stay():
    """A fade in which each step is as large as all others: EVS never sees how far it has gone."""
    frames = torch.eye(T)[:, None].expand(-1, P, -1)
    view = View.of(frames.reshape(1, T * P, T), layout=Layout.grid(H, W, T))
    assert ids(EVS(keep=2 * P + 3).reduce(view)) == list(range(2 * P + 3))


def test_every_frame_can_be_given_some_tokens():
    """One busy frame takes all of the budget that the first frame leaves."""
    frames = 1 + 0.01 * tokens(0, T * P)[0].unflatten(0, (T, P))
    frames[T - 1] = tokens(1, P)[0]
    view = View.of(frames.reshape(1, T * P, -1), layout=Layout.grid(H, W, T))
    count = lambda method: torch.tensor(ids(method.reduce(view))).div(P, rounding_mode="floor").bincount(minlength=T)  # noqa: E731
    assert count(EVS(keep=P + 12)).tolist() == [P, 0, 0, 0, 0, 12]
    assert count(EVS(keep=P + 12, each=2)).tolist() == [P, 2, 2, 2, 2, 4]
    best = ids(EVS(keep=P + 12).reduce(view))[-12:]
    assert set(ids(EVS(keep=P + 12, each=2).reduce(view))[-4:]) <= set(best)


def test_a_picture_keeps_an_even_part():
    """It is one frame, before which there is nothing: no half of it is empty."""
    kept = torch.tensor(ids(EVS(keep="25%").reduce(clip(t=1, h=8, w=8))))
    assert len(kept) == 16
    for half in (kept // 8 < 4, kept % 8 < 4):
        assert 6 <= int(half.sum()) <= 10
    assert released("25%").reduce(clip(t=1, h=8, w=8)).m == 64
    assert released("25%").reduce(View.of(tokens(0, 48), layout=Picture.tiled(4, 2, 1).lm)).m == 48


def test_a_token_behind_one_that_is_gone_is_new():
    view = moving()
    stay = torch.tensor([j for j in range(T * P) if j != 3 * P])[None]
    part = replace(view, tokens=view.tokens[:, stay[0]], ids=stay)
    kept = stay[0, ids(EVS(keep=P + 1).reduce(part))].tolist()
    assert kept == [*range(P), 4 * P]


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_broken_tokens_are_counted_and_go_first(value):
    view = moving()
    view.tokens[0, [2, P + 7]] = value
    found = EVS(keep=T * P - 2).reduce(view)
    assert not {2, P + 7} & set(ids(found))
    assert int(view.notes["nan_scores"]) == 2
    assert 2 * P + 7 in ids(EVS(keep=P + 1).reduce(view))  # what comes after one is new


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_computed_in_fp32(dtype):
    view = clip(3, b=2)
    half = replace(view, tokens=view.tokens.to(dtype))
    wide = replace(view, tokens=half.tokens.float())
    assert torch.equal(EVS(keep=50).score(half), EVS(keep=50).score(wide))


def test_a_batch_is_its_items_alone():
    view = clip(4, b=3, d=33)
    together = EVS(keep=50).score(view)
    for i in range(3):
        assert torch.equal(together[i : i + 1], EVS(keep=50).score(View.of(view.tokens[i : i + 1], layout=view.layout)))


@pytest.mark.parametrize(("name", "value"), [("keep", 1.5), ("each", -1), ("exact", 2)])
def test_bad_settings_say_what_is_allowed(name, value):
    with pytest.raises(WinnowError, match=name):
        EVS(**{name: value})
