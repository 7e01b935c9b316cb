"""HoliTom by its card: the windows that save most, static places merged in time and space, and merging in the LM."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise, product
from math import ceil

import numpy as np
import pytest
import torch
from torch.nn.functional import cosine_similarity

from winnow.core.errors import WinnowError
from winnow.core.info import ModelInfo
from winnow.core.layout import Layout
from winnow.core.reduction import Reduction
from winnow.core.step import State
from winnow.core.view import View
from winnow.methods.holitom import HoliTom
from winnow.parts.segments import most_saved
from winnow.signals.language import LMAttention
from winnow.signals.vision import VisionAttention
from winnow.testing import Picture

from .stubs import STUBS, scores, tokens

ATTENTION, QWEN = VisionAttention(query="all"), ModelInfo("Qwen2", depth=28)
SIDE, T = 6, 8
P = SIDE * SIDE


def clip(seed=0, *, frames=T, cut=5, moving=2, noise=0.2, d=24):
    """`[frames, P, d]`: two still scenes with some noise, in which the first columns change in every frame."""
    scene = tokens(seed, P, d, 2)[(torch.arange(frames) >= cut).long()]
    x = scene + noise * tokens(seed + 100, P, d, frames)
    fresh = torch.arange(P) % SIDE < moving
    return torch.where(fresh[None, :, None], tokens(seed + 200, P, d, frames), x)


def shown(x, seed=0):
    """A view of clips of one length, each `[t, P, d]`, with random attention."""
    flat = torch.stack([own.flatten(0, 1) for own in x])
    layout = Layout.grid(SIDE, SIDE, len(x[0]))
    return View.of(flat, {ATTENTION: scores(seed + 300, layout.n, len(x))}, layout=layout)


def _for(step, view):
    """The view as a step of a bound method is shown it."""
    return replace(view, signals=step.signals(lambda signal: view[ATTENTION]))


# The released code, as its steps are, in loops: which token stands for each output, and its row.


def windows(same, longest=1024):
    best, first = [], []
    for i in range(len(same) + 1):
        value, start = best[i - 1] if i else 0, i
        for size in range(2, min(i + 1, longest) + 1):
            j = i - size
            saved = sum(map(all, zip(*same[j + 1 : i], strict=True))) * (size - 1)
            if (best[j] if j >= 0 else 0) + saved > value:
                value, start = (best[j] if j >= 0 else 0) + saved, j + 1
        best.append(value)
        first.append(start)
    found, i = [], len(same)
    while i >= 0:
        found.insert(0, (first[i], i))
        i = first[i] - 1
    return found, best[-1]


def peaks(x, count, near=7):
    """DPC-KNN without the noise: centres, and the distances."""
    n = len(x)
    far = torch.stack([(x - row).norm(dim=1) for row in x]) / x.shape[1] ** 0.5
    density = [float((-(far[i].sort().values[: min(near, count)] ** 2).mean()).exp()) for i in range(n)]
    apart = [min((float(far[i, j]) for j in range(n) if density[j] > density[i]), default=far.max()) for i in range(n)]
    return sorted(sorted(range(n), key=lambda i: -float(apart[i]) * density[i])[:count]), far


def released(x, attention, share, tau, centre=0.6):
    x = x.double()
    t, p, _ = x.shape
    same = [[float(cosine_similarity(x[a, i], x[a + 1, i], dim=0)) > tau for i in range(p)] for a in range(t - 1)]
    found, saved = windows(same)
    ratio = min(share / ((t * p - saved) / (t * p)), 1)
    standing, rows = [], []
    for start, end in found:
        static = [i for i in range(p) if start < end and all(same[a][i] for a in range(start, end))]
        if count := round(len(static) * ratio):
            means = x[start : end + 1][:, static].mean(0)
            centres, far = peaks(means, count)
            near = {
                i: min(centres, key=lambda c, i=i: float(far[i, c])) for i in range(len(static)) if i not in centres
            }
            for c in centres:
                own = [i for i, owner in near.items() if owner == c]
                standing.append(start * p + static[c])
                rows.append(centre * means[c] + (1 - centre) * means[own].mean(0) if own else means[c])
        dynamic = [i for i in range(p) if i not in static]
        for frame in range(start, end + 1):
            order = sorted(dynamic, key=lambda i: -float(attention[frame, i]))
            for i in sorted(order[: ceil(len(dynamic) * ratio)]):
                standing.append(frame * p + i)
                rows.append(x[frame, i])
    return standing, torch.stack(rows), len(found) if ratio < 1 else t * p


def _as_in_the_code(reduce, shares=(0.1, 0.15, 0.2, 0.25, 0.6)):
    for seed, share in enumerate(shares):
        tau = 0.65 if share == 0.1 else 0.8
        view = shown([clip(seed), clip(seed + 50, cut=3, moving=4)], seed)
        reduction = reduce(view, share, tau)
        for lane in range(2):
            x, attention = view.tokens[lane].unflatten(0, (T, P)), view[ATTENTION][lane].unflatten(0, (T, P))
            standing, rows, slack = released(x, attention, share, tau)
            own = reduction.lane(lane)
            assert own.representatives.tolist() == standing
            torch.testing.assert_close(own.apply(view.tokens[lane]).double(), rows, rtol=1e-5, atol=1e-5)
            assert abs(own.m - share * T * P) <= T + slack


@pytest.mark.system("holitom", "exact")
def test_as_released_it_gives_what_the_code_gives():
    """Index for index, with static tokens of a window first; as many as the share, but for rounding."""
    _as_in_the_code(lambda view, share, tau: HoliTom.as_released(keep=share, tau=tau).reduce(view))


@pytest.mark.parametrize("stub", STUBS)
def test_the_code_fails_for_a_stub(stub):
    with pytest.raises(AssertionError):
        _as_in_the_code(lambda view, share, tau: stub(view, int(share * view.n)))


@pytest.mark.system("holitom", "exact")
@pytest.mark.parametrize("frames", [2, 5, 8])
def test_no_segmentation_saves_more(frames):
    """All of them are tried."""
    for seed in range(4):
        same = torch.rand(1, frames - 1, 5, generator=torch.Generator().manual_seed(seed)) > 0.3
        totals = []
        for cuts in product((False, True), repeat=frames - 1):
            starts = [0, *(i + 1 for i, cut in enumerate(cuts) if cut), frames]
            totals.append(sum((b - a - 1) * int(same[0, a : b - 1].all(0).sum()) for a, b in pairwise(starts)))
        assert int(most_saved(same)[1]) == max(totals)


@pytest.mark.system("holitom", "exact")
@pytest.mark.parametrize(("keep", "left"), [("10%", 29), ("50%", P), (5, 5)])
def test_equal_frames_are_one_window(keep, left):
    """Each output holds tokens of every frame; no more are left than one frame has."""
    view = shown([clip(cut=T, moving=0, noise=0)])
    reduction = HoliTom(keep=keep).reduce(view)
    assert reduction.m == left
    weights = reduction.to_matrix()[0].unflatten(1, (T, P))
    assert torch.allclose(weights, weights[:, :1].expand_as(weights))
    assert reduction.is_stochastic


@pytest.mark.system("holitom", "exact")
@pytest.mark.parametrize("keep", [1, 20, 100, "15%", "40%", 0.5])
def test_the_budget_is_met_in_total(keep):
    """As far as there are so many tokens once static ones are stored once."""
    for seed in range(3):
        reduction = HoliTom(keep=keep).reduce(shown([clip(seed), clip(seed + 9)], seed))
        assert reduction.m == HoliTom(keep=keep).keep.of(T * P)
        assert reduction.counts is None
        assert (reduction.representatives.diff() > 0).all()
    full = HoliTom(keep="100%").reduce(shown([clip(), clip(moving=4)]))
    assert full.counts is not None
    assert max(full.counts) < T * P


@pytest.mark.system("holitom", "exact")
def test_at_its_identity_nothing_changes():
    method = HoliTom(**HoliTom.identity)
    (step,) = method.bind(QWEN)[1]
    reduction = step.act(_for(step, shown([clip(), clip(1)])), State())[0].reduction
    assert reduction.is_selection
    assert reduction.index.tolist() == [list(range(T * P))] * 2


def _flash_stays(reduce):
    """A frame unlike all others is averaged with none of them."""
    x = clip(cut=T, moving=0, noise=0.05)
    x[3] = tokens(9, P, 24)[0]
    reduction = reduce(shown([x]))
    used = (reduction.to_matrix()[0].unflatten(1, (T, P)) != 0).any(2)
    assert used[:, 3].any()
    assert not (used[:, 3] & (used.sum(1) > 1)).any()
    assert (used.sum(1) > 1).any()


@pytest.mark.system("holitom", "exact")
def test_a_flash_is_never_averaged_away():
    _flash_stays(HoliTom(keep="20%").reduce)


def test_a_flash_is_averaged_away_by_a_stub():
    """The mean of every two frames."""
    pairs = (torch.arange(T * P) // (2 * P) * P + torch.arange(T * P) % P)[None]
    with pytest.raises(AssertionError):
        _flash_stays(lambda view: Reduction.assign(pairs, torch.full((1, T * P), 0.5), m=T * P // 2))


def test_order_and_centre():
    view = shown([clip()])
    place, window = (HoliTom(order=order).reduce(view) for order in ("place", "window"))
    assert place.ordered
    assert not window.ordered
    order = window.representatives[0].argsort()
    torch.testing.assert_close(place.to_matrix()[0], window.to_matrix()[0][order])
    even = HoliTom(centre=None).reduce(view).to_matrix()[0]
    assert all(len(row[row > 0].unique()) == 1 for row in even)


def test_frames_in_another_order_of_tokens():
    """Where a layout lists places first, the same tokens are kept."""
    view, turn = shown([clip()]), torch.arange(T * P).unflatten(0, (T, P)).T.flatten()
    rows = {name: getattr(view.layout, name)[turn.numpy()] for name in ("kind", "tile", "cell", "place", "boxes")}
    layout = Layout.of(("turned", SIDE, T), [rows])
    turned = View.of(view.tokens[:, turn], {ATTENTION: view[ATTENTION][:, turn]}, layout=layout)
    want, found = HoliTom().reduce(view).to_matrix()[0], HoliTom().reduce(turned).to_matrix()[0]
    assert {tuple(row.nonzero()[:, 0].tolist()) for row in want} == {
        tuple(turn[row.nonzero()[:, 0]].sort().values.tolist()) for row in found
    }


@pytest.mark.parametrize("picture", [Picture.grid(6, 5), Picture.tiled(4, 2, 1)], ids=lambda p: p.name)
def test_a_picture_is_one_frame(picture):
    n = picture.lm.n_content
    score = scores(0, n)
    reduction = HoliTom(keep=9).reduce(View.of(tokens(0, n), {ATTENTION: score}, layout=picture.lm))
    assert reduction.index[0].tolist() == score[0].topk(9).indices.sort().values.tolist()


def test_after_an_earlier_method_a_video_is_refused():
    view = shown([clip()])
    fewer = View(view.tokens[:, 1:], view.layout, view.ids[:, 1:], T * P, {ATTENTION: view[ATTENTION][:, 1:]})
    with pytest.raises(WinnowError, match="holitom needs a token at each of 36 places of 8 frames"):
        HoliTom().reduce(fewer)


def test_broken_tokens_are_dynamic_and_last():
    x = clip(cut=T, moving=1)
    x[4, 7] = torch.nan
    view = shown([x])
    reduction = HoliTom(keep="20%").reduce(view)
    assert int(view.notes["nan_scores"]) == 1
    assert not reduction.kept[0, 4 * P + 7]
    assert reduction.apply(view.tokens).isfinite().all()


def test_a_batch_is_its_videos_and_half_precision_its_single():
    for settings in ({}, {"exact": False, "order": "window"}):
        view = shown([clip(0).bfloat16(), clip(1, cut=2).bfloat16(), clip(2, moving=0).bfloat16()])
        whole = HoliTom(keep="30%", **settings).reduce(view)
        for lane in range(3):
            one = {ATTENTION: view[ATTENTION][lane : lane + 1]}
            alone = HoliTom(keep="30%", **settings).reduce(
                View.of(view.tokens[lane : lane + 1].float(), one, layout=view.layout)
            )
            assert torch.equal(whole.lane(lane).to_matrix(), alone.lane(0).to_matrix())


# Inside the LM.


def _inner(n, keep="50%", merge="halving"):
    (_, step) = HoliTom(inner=keep, merge=merge).bind(QWEN)[1]
    assert (str(step.at), step.needs) == ("layers[18]", (LMAttention(17),))
    row = scores(n, n)
    view = View.of(tokens(n, n, 12), {step.needs[0]: row}, n_visual=5 * n, n_lm=n)
    return step, view, row[0].tolist()


@pytest.mark.system("holitom", "exact")
@pytest.mark.parametrize("n", [2, 9, 50, 51])
def test_as_released_tokens_go_one_by_one_into_the_likest_that_stays(n):
    step, view, row = _inner(n)
    x = view.tokens[0].double().clone()
    best = sorted(range(n), key=lambda i: -row[i])[: round(n * 0.5)]
    rest = [i for i in range(n) if i not in best]
    target = {i: max(best, key=lambda j, i=i: float(cosine_similarity(x[i], x[j], dim=0))) for i in rest}
    for i in rest:
        x[target[i]] = (x[target[i]] + x[i]) / 2
    action = step.act(view, State())[0]
    assert action.reduction.representatives[0].tolist() == sorted(best)
    torch.testing.assert_close(action.reduction.apply(view.tokens)[0].double(), x[sorted(best)], rtol=1e-5, atol=1e-5)


@pytest.mark.system("holitom", "exact")
def test_by_default_tokens_count_by_what_they_stand_for():
    outer, inner = HoliTom(keep="30%").bind(QWEN)[1]
    view = _for(outer, shown([clip()]))
    action, state = outer.act(view, State())
    feeds = (action.reduction.to_matrix() != 0).float()
    state = State(summed={"size": (feeds @ state.summed["size"][..., None])[..., 0]})
    assert state.summed["size"].max() >= 3
    left = action.reduction.apply(view.tokens)
    seen = View(left, view.layout, action.reduction.representatives, T * P, {inner.needs[0]: scores(1, left.shape[1])})
    reduction = inner.act(seen, state)[0].reduction
    size = state.summed["size"][0]
    for row in reduction.to_matrix()[0]:
        own = row.nonzero()[:, 0]
        torch.testing.assert_close(row[own], size[own] / size[own].sum())


@pytest.mark.parametrize(("depth", "layer"), [(28, 18), (80, 51), (4, 2), (1, None)])
def test_where_it_merges_in_the_lm(depth, layer):
    if layer is None:
        with pytest.raises(WinnowError):
            HoliTom().bind(ModelInfo(depth=depth))
        (step,) = HoliTom(inner="100%").bind(ModelInfo(depth=depth))[1]
        assert str(step.at) == "projected"
        return
    assert [str(step.at) for step in HoliTom().bind(ModelInfo(depth=depth))[1]] == ["projected", f"layers[{layer}]"]


@pytest.mark.parametrize("content", [288, 576, 25])
@pytest.mark.parametrize("budget", [1, 13, 64, "12.5%", "25%", "60%"])
def test_at_a_budget_that_many_are_left_of_a_picture(budget, content):
    method = HoliTom().at_budget(budget, content)
    outer, inner = method.bind(QWEN)[1]
    view = View.of(tokens(0, content, 4), {ATTENTION: scores(0, content)})
    left = outer.act(_for(outer, view), State())[0].reduction.m
    seen = View.of(tokens(1, left, 4), {inner.needs[0]: scores(1, left)}, n_visual=content, n_lm=left)
    assert inner.act(seen, State())[0].reduction.m == method.keep.parse(budget).rounded("half-even").of(content)


@pytest.mark.parametrize(
    "settings", [{"tau": 3}, {"centre": 1.5}, {"near": 0}, {"longest": 0}, {"order": "x"}, {"merge": "x"}, {"layer": 0}]
)
def test_wrong_settings(settings):
    with pytest.raises(WinnowError, match="allowed"):
        HoliTom(**settings)


def _shows_what_moves(reduce):
    """A third of the picture moves. At 15 % more of it is left than of as many tokens at random."""
    moves = torch.arange(T * P) % SIDE < 2
    gaps = []
    for seed in range(12):
        view = shown([clip(seed)], seed)
        reduction = reduce(view, 43)
        assert reduction.m == 43
        random = torch.rand(T * P, generator=torch.Generator().manual_seed(seed)).argsort()[:43]
        own = float(reduction.kept[0, moves].float().mean())
        gaps.append(own - float(torch.isin(torch.arange(T * P)[moves], random).float().mean()))
    gaps = np.array(gaps)
    assert gaps.mean() > 2 * gaps.std(ddof=1) / len(gaps) ** 0.5


@pytest.mark.system("holitom", "directional")
def test_what_is_saved_on_still_places_goes_to_what_moves():
    _shows_what_moves(lambda view, k: HoliTom(keep=k).reduce(view))


@pytest.mark.parametrize("stub", STUBS)
def test_what_moves_fails_for_a_stub(stub):
    with pytest.raises(AssertionError):
        _shows_what_moves(stub)
