"""GlobalCom² by its card: ratios of crops that mean R, local and global logits in a crop, and the released code."""

from __future__ import annotations

import functools
import math

import numpy as np
import pytest
import torch
from torch.nn.functional import interpolate

from tests.methods.directional import at_random, gap
from winnow.core.errors import UnsupportedError, WinnowError
from winnow.core.info import ModelInfo
from winnow.core.layout import Layout, grid_rows
from winnow.core.plan import Plan
from winnow.core.view import View
from winnow.methods.globalcom2 import GlobalCom2
from winnow.signals.features import ClsLogits
from winnow.signals.vision import TowerAttention, VisionAttention

from .stubs import STUBS, first_k, ids, scores, tokens, uniform

ROW = GlobalCom2().row


@functools.cache
def unpadded(side: int, down: int, across: int, cut: tuple[int, int]) -> Layout:
    """A thumbnail and a mosaic from which padding has been cut, as many rows and columns on either side."""
    rows, cols = np.arange(cut[0], down * side - cut[0]), np.arange(cut[1], across * side - cut[1])
    line, col = np.meshgrid(rows, cols, indexing="ij")
    tile = 1 + line // side * across + col // side
    cell = tile * side**2 + line % side * side + col % side
    mosaic = grid_rows(len(rows), len(cols), grid=1, tile=tile[None], cell=cell[None], newline=True)
    return Layout.of(("unpadded", side, down, across, cut), [grid_rows(side, side), mosaic])


def _view(logits: torch.Tensor, layout: Layout) -> View:
    """`[b, tiles · side²]` logits of all patches, of which the layout's tokens are shown."""
    shown = logits[:, torch.from_numpy(layout.cell[layout.content])]
    return View.of(tokens(0, layout.n_content, 4, b=len(logits)), {ROW: shown}, layout=layout)


def _ratios(g: list[float], side: int, down: int, across: int, share: float, temperature: float) -> list[float]:
    sums = [0.0] * (down * across)
    for i, value in enumerate(g):
        row, col = divmod(i, side)
        sums[min(row // (side // down), down - 1) * across + min(col // (side // across), across - 1)] += value
    powers = [math.exp((s - max(sums)) / temperature) for s in sums]
    p = [power / (sum(powers) + 1e-8) for power in powers]
    return [min(1.0, share * (1 + one - sum(p) / len(p))) for one in p]


def _naive(
    logits: torch.Tensor, side: int, down: int, across: int, cut: tuple[int, int], share: float, temperature=10.0
):
    """The released code on one picture: of each tile `[side²]` logits; content ids, ascending."""
    thumbnail, *crops = logits.reshape(-1, side, side)
    best = thumbnail.flatten().sort(descending=True, stable=True).indices
    kept = best[: int(side * side * share)].tolist()
    rows, cols = down * side - 2 * cut[0], across * side - 2 * cut[1]
    wide = interpolate(thumbnail[None, None], (rows, cols), mode="bilinear", align_corners=False)[0, 0]
    for number, ratio in enumerate(_ratios(thumbnail.flatten().tolist(), side, down, across, share, temperature)):
        at = divmod(number, across)
        here = [(r, c) for r in range(rows) for c in range(cols) if ((r + cut[0]) // side, (c + cut[1]) // side) == at]
        own = torch.stack([crops[number][(r + cut[0]) % side, (c + cut[1]) % side] for r, c in here])
        there = torch.stack([wide[r, c] for r, c in here])
        both = own / own.norm() + there / there.norm()
        best = both.sort(descending=True, stable=True).indices[: int(len(here) * ratio)].tolist()
        kept += [side * side + here[i][0] * cols + here[i][1] for i in best]
    return sorted(kept)


CASES = [
    pytest.param(side, down, across, cut, id=f"{down}x{across}of{side}-{cut}")
    for side, down, across, cut in (
        (6, 2, 2, (0, 0)), (6, 1, 2, (0, 0)), (5, 3, 1, (0, 0)), (6, 2, 2, (2, 0)), (5, 2, 1, (0, 1)),
        (24, 2, 2, (5, 0)),
    )
]  # fmt: skip


def _is_the_released_code(reduce, side, down, across, cut):
    for seed, share in enumerate((0.25, 0.1, 0.6)):
        logits = torch.randn(1, (1 + down * across) * side**2, generator=torch.Generator().manual_seed(seed)) * 2
        logits[:, : side * side // 2] += 1
        view = _view(logits, unpadded(side, down, across, cut))
        assert ids(reduce(view, share)) == _naive(logits[0], side, down, across, cut, share)


@pytest.mark.system("globalcom2", "exact")
@pytest.mark.parametrize(("side", "down", "across", "cut"), CASES)
def test_released_equals_the_released_code(side, down, across, cut):
    _is_the_released_code(lambda view, share: GlobalCom2.as_released(keep=share).reduce(view), side, down, across, cut)
    assert Plan.of("globalcom2:released").positions == "compact"


@pytest.mark.parametrize("stub", STUBS)
def test_the_released_code_fails_for_a_stub(stub):
    with pytest.raises(AssertionError):
        _is_the_released_code(lambda view, share: stub(view, int(share * view.n)), 6, 2, 2, (0, 0))


@pytest.mark.system("globalcom2", "exact")
@pytest.mark.parametrize(("side", "down", "across", "cut"), CASES)
def test_exact_keeps_the_budget_and_differs_from_rounding_by_few(side, down, across, cut):
    layout = unpadded(side, down, across, cut)
    for seed, share in enumerate((0.05, 0.25, 0.5, 0.99)):
        view = _view(scores(seed, (1 + down * across) * side**2, b=2), layout)
        exact, floor = GlobalCom2(keep=share).reduce(view), GlobalCom2(keep=share, exact=False).reduce(view)
        assert exact.counts is None
        assert exact.m == GlobalCom2(keep=share).keep.of(layout.n_content)
        for lane in range(2):
            tile = lambda found: np.bincount(layout.tiles[ids(found, lane)], minlength=1 + down * across)  # noqa: B023, E731
            assert abs(tile(exact) - tile(floor)).max() <= 1 + abs(exact.m - len(ids(floor, lane)))


@pytest.mark.system("globalcom2", "exact")
def test_ratios_of_crops_have_the_mean_of_the_share():
    layout = unpadded(24, 2, 2, (0, 0))
    for seed in range(5):
        logits = scores(seed, 5 * 576) * 3
        found = ids(GlobalCom2(keep=0.25, exact=False).reduce(_view(logits, layout)))
        counts = np.bincount(layout.tiles[found])
        assert counts[0] == 144
        assert abs(counts[1:].sum() - 4 * 144) <= 4  # each is rounded down


@pytest.mark.system("globalcom2", "exact")
def test_a_thumbnail_that_sees_nothing_leaves_crops_to_themselves():
    layout = unpadded(6, 2, 2, (0, 0))
    logits = scores(3, 5 * 36)
    logits[:, :36] = 1
    found = ids(GlobalCom2(keep=0.25).reduce(_view(logits, layout)))
    for t in range(1, 5):
        mine = np.flatnonzero(layout.tiles == t)
        local = logits[0, layout.cell[layout.content][mine]]
        assert [j for j in found if layout.tiles[j] == t] == sorted(mine[local.topk(9).indices.numpy()].tolist())


@pytest.mark.system("globalcom2", "exact")
def test_share_one_is_everything_when_exact_and_not_in_the_released_code():
    layout = unpadded(6, 2, 2, (1, 0))
    logits = scores(3, 5 * 36) * 9
    assert GlobalCom2(keep="100%").reduce(_view(logits, layout)).m == layout.n_content
    assert len(ids(GlobalCom2.as_released(keep="100%").reduce(_view(logits, layout)))) < layout.n_content


@pytest.mark.system("globalcom2", "exact")
def test_a_round_ratio_loses_a_token_as_in_the_released_code():
    """All that the thumbnail sees lies in one of two crops: 1.5 · 0.5 of its 16 tokens are 12, less a little."""
    logits = scores(2, 3 * 16)
    logits[:, :8] += 1000
    layout = unpadded(4, 2, 1, (0, 0))
    found = ids(GlobalCom2.as_released(keep=0.5).reduce(_view(logits, layout)))
    assert np.bincount(layout.tiles[found]).tolist() == [8, 11, 4]
    assert found == _naive(logits[0], 4, 2, 1, (0, 0), 0.5)


def test_without_crops_the_highest_logits_stay():
    row = scores(1, 36)
    view = View.of(tokens(0, 36), row, layout=Layout.grid(6, 6))
    assert ids(GlobalCom2(keep=7).reduce(view)) == sorted(row[0].topk(7).indices.tolist())


def test_something_is_left_of_a_small_picture():
    logits = scores(1, 5 * 16)
    assert ids(GlobalCom2(keep=1, exact=False).reduce(_view(logits, unpadded(4, 2, 2, (0, 0))))) == [
        int(logits[0, :16].argmax())
    ]


def test_a_broken_token_is_left_out_of_both_sides():
    layout = unpadded(6, 2, 2, (0, 0))
    logits = scores(5, 5 * 36)
    logits[0, 7] = torch.nan
    logits[0, 50] = torch.inf
    view = _view(logits, layout)
    gone = [int(np.flatnonzero(layout.cell[layout.content] == cell)[0]) for cell in (7, 50)]
    kept = ids(GlobalCom2(keep=0.5).reduce(view))
    assert not set(gone) & set(kept)
    assert int(view.notes["nan_scores"]) == 1


def test_half_precision_and_batches():
    layout = unpadded(6, 2, 2, (2, 0))
    logits = (scores(6, 5 * 36, b=3) * 4).bfloat16()
    for method in (GlobalCom2(), GlobalCom2(exact=False)):
        both = method.reduce(_view(logits, layout))
        for lane in range(3):
            alone = method.reduce(_view(logits[lane : lane + 1].float(), layout))
            assert ids(both, lane) == ids(alone)


def test_the_signal_is_what_the_softmax_is_given():
    generator = torch.Generator().manual_seed(0)
    q, k = (torch.randn(2, 3, 10, 4, generator=generator) for _ in range(2))
    found = ClsLogits(layer=-1).read(TowerAttention(q, k, k, 0.5, 1))
    want = torch.einsum("thd,thnd->thn", q[:, :, 0], k).mean(1)[:, 1:] * 0.5
    torch.testing.assert_close(found, want)


def test_settings_and_models_that_do_not_go_are_refused():
    with pytest.raises(WinnowError, match="temperature=0"):
        GlobalCom2(temperature=0)
    with pytest.raises(UnsupportedError, match="no \\[CLS\\]"):
        GlobalCom2().bind(ModelInfo(has_cls=False))
    (step,) = GlobalCom2().checked_steps(ModelInfo(vision_depth=24, feature_layer=-2))
    assert (str(step.at), step.needs) == ("projected", (ClsLogits(23),))
    assert Plan.of("globalcom2:row=VisionAttention(layer=-1)").methods[0].row == VisionAttention(-1)


@functools.cache
def _scene(seed: int) -> tuple[torch.Tensor, Layout, set[int], int]:
    """Noisy logits of a picture with one thing in one quadrant; the tokens of the thing in crops, and its crop."""
    layout, generator = unpadded(12, 2, 2, (0, 0)), torch.Generator().manual_seed(seed)
    logits = torch.randn(1, 5 * 144, generator=generator)
    corner = torch.randint(0, 2, (2,), generator=generator)
    low = corner * 0.5 + torch.rand(2, generator=generator) * 0.2
    thing = layout.covering([(float(low[1]), float(low[0]), float(low[1]) + 0.25, float(low[0]) + 0.25)], 0.5)
    cell = layout.cell[layout.content]
    logits[0, cell[thing]] += torch.from_numpy(np.where(layout.tiles[thing] == 0, 4.0, 1.0)).float()
    return logits, layout, set(np.flatnonzero(thing & (layout.tiles > 0)).tolist()), 1 + int(corner[0] * 2 + corner[1])


def _recalls(reduce) -> np.ndarray:
    found = []
    for seed in range(12):
        logits, layout, thing, _ = _scene(seed)
        found.append(len(thing & set(ids(reduce(_view(logits, layout))))) / len(thing))
    return np.array(found)


@functools.cache
def _blind() -> np.ndarray:
    return _recalls(GlobalCom2(keep=0.1, temperature=1e6).reduce)  # equal ratios


def _finds_the_thing(reduce):
    more = gap(_recalls(reduce), _blind())
    assert more.low > 0


@pytest.mark.system("globalcom2", "directional")
def test_a_thing_in_one_crop_gets_the_largest_ratio_and_more_of_it_is_kept():
    for seed in range(12):
        logits, layout, _, crop = _scene(seed)
        counts = np.bincount(layout.tiles[ids(GlobalCom2(keep=0.1).reduce(_view(logits, layout)))], minlength=5)
        assert counts[1:].argmax() == crop - 1
    _finds_the_thing(GlobalCom2(keep=0.1).reduce)


@pytest.mark.parametrize("stub", [first_k, uniform, lambda v, k: GlobalCom2(keep=k, temperature=1e6).reduce(v)])
def test_a_stub_does_not_find_the_thing(stub):
    with pytest.raises(AssertionError):
        _finds_the_thing(lambda view: stub(view, 72))


def _finds_evidence(sample, select):
    more = gap(sample.recall(sample.kept(select, 32)), sample.recall(sample.kept(at_random, 32)))
    assert more.low > 0


@pytest.mark.system("globalcom2", "directional")
@pytest.mark.xdist_group("samples")
def test_without_crops_it_keeps_what_the_last_block_attends_to(sample):
    """By the attention that the sample holds of that block; the logits before it rank nearly alike."""
    _finds_evidence(sample, lambda view, k: GlobalCom2(keep=k, row=VisionAttention(-1)).reduce(view))


@pytest.mark.xdist_group("samples")
@pytest.mark.parametrize("stub", [first_k, uniform, at_random])
def test_a_stub_finds_no_evidence(sample, stub):
    with pytest.raises(AssertionError):
        _finds_evidence(sample, stub)
