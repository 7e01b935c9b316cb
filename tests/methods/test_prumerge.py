"""PruMerge by its card: outliers of [CLS] attention, sums of the nearest, and the token that sums up the rest."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch.nn.functional import normalize

from tests.methods.directional import at_random, evenly, gap
from winnow.core.errors import UnsupportedError, WinnowError
from winnow.core.layout import Layout
from winnow.core.reduction import Reduction
from winnow.core.step import State
from winnow.core.view import View
from winnow.methods.prumerge import KEYS, ROW, PruMerge
from winnow.signals.vision import TowerAttention
from winnow.testing import WITH_CLS, WITHOUT_CLS, Picture

from .stubs import first_k, scores, tokens

SIDE = 12
GRID = Layout.grid(SIDE, SIDE, cls=True)


def _spiky(seed, n, spikes):
    """Attention that sums to 1, with that many outliers."""
    row = 1 + 0.1 * scores(seed, n)
    at = torch.randperm(n, generator=torch.Generator().manual_seed(seed))[:spikes]
    row[:, at] += 1 + scores(seed + 1, spikes)
    return row / row.sum()


def _view(seed=0, spikes=9, layout=GRID, row=None):
    row = _spiky(seed, layout.n_content, spikes) if row is None else row
    return View.of(tokens(seed, layout.n, 12), {ROW: row, KEYS: tokens(seed + 1, layout.n, 16)}, layout=layout)


def _sums(x, row, keys, kept, neighbours):
    """Outputs of one tile, patches only, in lists."""
    unit, n = normalize(keys.double(), dim=-1), len(row)
    out = []
    for i in kept:
        others = sorted((j for j in range(n) if j != i), key=lambda j: -float(unit[i] @ unit[j]))[:neighbours]
        out.append(x[i] + sum(row[j] * x[j] for j in others))
    rest = [j for j in range(n) if j not in kept]
    return torch.stack([*out, sum(row[j] * x[j] for j in rest)])


def _kept_as_released(row, plus):
    """The indices that the code has when it merges, with its own arithmetic."""
    attention, n = row.numpy(), len(row)
    low, high = np.percentile(attention, 25), np.percentile(attention, 75)
    ratio = len(np.where(attention > high + 1.5 * (high - low))[0]) / n
    kept = sorted(range(n), key=lambda j: -attention[j])[: int(n * ratio)]
    if plus:
        kept += [j for j in range(0, n - 1, int(int(1 / ratio) / 3)) if j not in kept]
    return kept


def _is_the_code(reduce):
    for seed, spikes in ((0, 1), (1, 4), (2, 9), (3, 13), (4, 20)):
        for plus in (False, True):
            view = _view(seed, spikes)
            x, row, keys = view.tokens[0, 1:], view[ROW][0], view[KEYS][0, 1:]
            kept = _kept_as_released(row, plus)
            assert (len(kept) == spikes) or plus or spikes == 20
            found = reduce(view, plus)
            assert (found.representatives[0, :-1] - 1).tolist() == kept
            torch.testing.assert_close(found.apply(view.tokens)[0], _sums(x, row, keys, kept, 32), rtol=1e-4, atol=1e-5)


@pytest.mark.system("prumerge", "exact")
def test_as_released_it_is_the_code_written_naively():
    _is_the_code(lambda view, plus: PruMerge.as_released(plus=plus).reduce(view))


@pytest.mark.parametrize("stub", ["first", "top"])
def test_the_code_fails_for_a_stub(stub):
    def blind(view, plus):
        order = view[ROW].argsort(descending=True) + 1
        return first_k(view, 10) if stub == "first" else Reduction.select(order[:, :10], view.n, ordered=False)

    with pytest.raises(AssertionError):
        _is_the_code(blind)


@pytest.mark.system("prumerge", "exact")
@pytest.mark.parametrize("ratio", [1 / 8, 0.05])
def test_a_fixed_share_is_that_of_the_code_without_its_duplicates(ratio):
    view = _view(6, layout=Layout.grid(24, 24, cls=True))
    best = sorted(range(576), key=lambda j: -float(view[ROW][0, j]))[: int(576 * ratio)]
    step = int(1 / ratio)
    both = best + [j for j in range(step // 2, 575, step) if j not in best]
    for plus, want in ((False, best), (True, both)):
        found = PruMerge.as_released(ratio=ratio, plus=plus).reduce(view).representatives[0, :-1] - 1
        assert found.tolist() == want


@pytest.mark.system("prumerge", "exact")
@pytest.mark.parametrize("n", [576, 255, 100, 7])
def test_outliers_are_those_of_numpy(n):
    """And their share becomes a number as in the code, which loses one where a product is rounded down."""
    side = Layout.grid(1, n, cls=True)
    for seed in range(20):
        row = torch.rand(1, n, generator=torch.Generator().manual_seed(seed)).pow(6)
        want = max(1, len(_kept_as_released(row[0], False)))
        assert PruMerge().reduce(_view(seed, layout=side, row=row)).m == want + 1


@pytest.mark.system("prumerge", "exact")
def test_flat_attention_keeps_one_patch():
    view = _view(row=torch.full((1, GRID.n_content), 1 / GRID.n_content))
    assert PruMerge().reduce(view).representatives[0].tolist() == [1, 2]
    assert PruMerge(plus=True).reduce(view).representatives[0].tolist() == [1, *range(1 + 48, 144, 48), 2]


@pytest.mark.system("prumerge", "exact")
def test_outputs_do_not_depend_on_the_order_of_patches():
    view = _view(3)
    turn = torch.randperm(144, generator=torch.Generator().manual_seed(0))
    rows = torch.cat([torch.zeros(1, dtype=torch.int64), 1 + turn])
    other = View.of(view.tokens[:, rows], {ROW: view[ROW][:, turn], KEYS: view[KEYS][:, rows]}, layout=GRID)
    one, two = (PruMerge().reduce(v).apply(v.tokens) for v in (view, other))
    torch.testing.assert_close(one, two)


@pytest.mark.system("prumerge", "exact")
def test_weights_are_those_of_attention():
    view = _view(5)
    row, found = view[ROW][0], PruMerge(neighbours=6).reduce(view)
    matrix, at = found.to_matrix()[0], found.representatives[0]
    assert (matrix[:, 0] == 0).all()  # [CLS] goes nowhere
    for output, own in zip(matrix[:-1], at, strict=False):
        assert output[own] == 1
        others = [j for j in output.nonzero()[:, 0].tolist() if j != own]
        assert len(others) == 6
        assert torch.equal(output[others], row[[j - 1 for j in others]])
    rest = torch.ones(145, dtype=torch.bool).scatter(0, at[:-1], False)[1:]
    assert torch.equal(matrix[-1, 1:], row * rest)
    assert at[-1] - 1 == int((row * rest).argmax())
    means = PruMerge(neighbours=6, normalize=True).reduce(view)
    assert means.is_stochastic
    torch.testing.assert_close(means.to_matrix()[0], matrix / matrix.sum(1, keepdim=True))


@pytest.mark.system("prumerge", "exact")
def test_a_budget_is_exact_and_counts_the_sum():
    view = _view(1)
    order = (view[ROW][0].argsort(descending=True) + 1).tolist()
    for keep in (1, 2, 5, 40, 143, 144):
        found = PruMerge(keep=keep).reduce(view)
        assert found.representatives[0].tolist() == order[:keep]  # the sum stands for the best of the rest
        plus = PruMerge(keep=keep, plus=True).reduce(view).representatives[0].tolist()
        assert len(plus) == len(set(plus)) == keep
        best = max(1, (keep - 1) // 4)
        assert plus[:best] == order[:best]
        assert plus[best:-1] == sorted(plus[best:-1])


def test_the_grid_of_a_budget_is_spread_over_what_is_left():
    view = _view(2)
    found = PruMerge(keep=41, plus=True).reduce(view).representatives[0].tolist()
    rest = [j for j in range(1, 145) if j not in found[:10]]
    assert found[10:40] == [rest[i * 134 // 30] for i in range(30)]


def test_items_of_a_batch_may_keep_unequal_numbers():
    row = torch.cat([_spiky(0, 144, 3), _spiky(1, 144, 11)])
    x, keys = tokens(0, 145, 12, 2), tokens(1, 145, 16, 2)
    both = PruMerge().reduce(View.of(x, {ROW: row, KEYS: keys}, layout=GRID))
    assert both.counts == (4, 12)
    for i in range(2):
        alone = PruMerge().reduce(View.of(x[i : i + 1], {ROW: row[i : i + 1], KEYS: keys[i : i + 1]}, layout=GRID))
        assert torch.equal(both.lane(i).matrix, alone.lane(0).matrix)
        assert torch.equal(both.lane(i).representative, alone.lane(0).representative)


@pytest.mark.system("prumerge", "exact")
def test_tiles_are_worked_one_by_one():
    picture, rows = Picture.tiled(SIDE, 2, 1), [_spiky(seed, 144, spikes) for seed, spikes in ((1, 4), (2, 9), (3, 2))]
    x, keys = tokens(0, 3 * 145, 12), tokens(1, 3 * 145, 16)
    view = View.of(x, {ROW: torch.cat(rows, 1), KEYS: keys}, layout=picture.tower, n_visual=432)
    found = PruMerge().reduce(view)
    own = [slice(145 * t, 145 * (t + 1)) for t in range(3)]
    alone = [
        PruMerge().reduce(View.of(x[:, part], {ROW: row, KEYS: keys[:, part]}, layout=GRID))
        for row, part in zip(rows, own, strict=True)
    ]
    assert found.m == 5 + 10 + 3
    want = torch.cat([a.apply(x[:, part]) for a, part in zip(alone, own, strict=True)], 1)
    torch.testing.assert_close(found.apply(x), want)
    at = PruMerge(keep=8).reduce(view).representatives[0]
    assert torch.bincount(at // 145).tolist() == [3, 3, 2]
    assert PruMerge(keep=2).reduce(view).m == 2


def test_broken_values_are_counted_and_merged_last():
    row, keys = _spiky(0, 144, 5), tokens(1, 145, 16)
    row[0, 7], keys[0, 20] = torch.nan, torch.nan
    view = View.of(tokens(0, 145, 12), {ROW: row, KEYS: keys}, layout=GRID)
    found = PruMerge(keep=6).reduce(view)
    assert int(view.notes["nan_scores"]) == 2
    assert not {8, 20} & set(found.representatives[0].tolist())
    assert (found.to_matrix()[0, :, 20] == 0).all()
    assert found.to_matrix().isfinite().all()


def test_half_precision_chooses_what_fp32_chooses():
    row, keys = _spiky(0, 144, 5).bfloat16(), tokens(1, 145, 16).bfloat16()
    low, high = (
        PruMerge(plus=True).reduce(View.of(tokens(0, 145, 12), {ROW: r, KEYS: k}, layout=GRID))
        for r, k in ((row, keys), (row.float(), keys.float()))
    )
    assert torch.equal(low.representatives, high.representatives)
    assert torch.equal(low.matrix, high.matrix)


def test_the_signals_are_one_head_as_wide_as_the_tower():
    q, k = tokens(0, 2 * 3 * 10, 8).reshape(2, 3, 10, 8), tokens(1, 2 * 3 * 10, 8).reshape(2, 3, 10, 8)
    seen = TowerAttention(q, k, k, 8**-0.5, prefix=1)
    wide_q, wide_k = (x.transpose(1, 2).reshape(2, 10, 24) for x in (q, k))
    want = torch.stack([(a[0] @ b.T / 24**0.5).softmax(-1)[1:] for a, b in zip(wide_q, wide_k, strict=True)])
    torch.testing.assert_close(ROW.read(seen), want)
    assert torch.equal(KEYS.read(seen), wide_k)
    assert KEYS.covers_prefix


def test_it_reads_the_last_block_and_drops_newlines():
    (step,) = PruMerge().checked_steps(WITH_CLS)
    assert (str(step.at), [signal.layer for signal in step.needs]) == ("features", [11, 11])
    shown = step.signals(dict(zip(step.needs, _view().signals.values(), strict=True)).__getitem__)
    view = View.of(tokens(0, 145, 12), shown, layout=GRID)
    assert step.act(view, State())[0].separators == "drop"


def test_towers_without_cls_are_refused():
    with pytest.raises(UnsupportedError, match=r"no \[CLS\]"):
        PruMerge().checked_steps(WITHOUT_CLS)


@pytest.mark.parametrize(
    "settings", [{"keep": 0}, {"keep": 1.5}, {"neighbours": -1}, {"ratio": 2}, {"plus": 1}, {"normalize": "x"}]
)
def test_wrong_settings(settings):
    with pytest.raises(WinnowError, match="allowed"):
        PruMerge(**settings)


def _gaps(sample, kept):
    """The mean distance of a patch to the nearest that is kept, in patches."""
    place = torch.tensor(sample.layout.place[sample.layout.content][:, 2:]).double()
    apart = torch.cdist(place, place)
    return np.array([apart[:, own].amin(1).mean().item() for own in kept])


def _covers_and_finds(sample, kept):
    """Nearer to all of the picture than outliers alone, and more of the evidence than blind ones, with 33 tokens."""
    outliers = sample.answers("prumerge:keep=33")[1]
    assert gap(_gaps(sample, kept), _gaps(sample, outliers)).high < 0
    for blind in (evenly, at_random):
        assert gap(sample.recall(kept), sample.recall(mask(sample, blind))).low > 0
        assert gap(sample.recall(outliers), sample.recall(mask(sample, blind))).low > 0


def mask(sample, stub):
    return torch.cat([stub(view, 33).kept for view in sample.views["projected"]])


@pytest.mark.system("prumerge", "directional")
@pytest.mark.xdist_group("samples")
def test_plus_covers_the_picture_and_finds_evidence(some):
    _covers_and_finds(some, some.answers("prumerge:keep=33,plus=true")[1])


@pytest.mark.xdist_group("samples")
@pytest.mark.parametrize("stub", [first_k, evenly, at_random])
def test_covering_fails_for_a_stub(some, stub):
    with pytest.raises(AssertionError):
        _covers_and_finds(some, mask(some, stub))
