"""Tokens merged into the one that they are most like, against loops."""

from __future__ import annotations

import pytest
import torch
from torch.nn.functional import normalize

from winnow.core.view import View
from winnow.parts.nearest_merge import halving_naive, halving_weights, into_nearest

from .test_select import HostReads


def _random(seed, *shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def _naive(x, score, size, keep, merge):
    """Rows of one item, and the tokens that stand for them."""
    best = sorted(range(len(x)), key=lambda i: -score[i])[:keep]
    alike = normalize(x, dim=-1) @ normalize(x, dim=-1).T
    rest = [i for i in range(len(x)) if i not in best]
    target = {i: max(best, key=lambda j, i=i: float(alike[i, j])) for i in rest}
    rows = []
    for j in sorted(best):
        own = [i for i in rest if target[i] == j]
        if merge == "halving":
            rows.append(torch.stack([torch.as_tensor(halving_naive(x[own, c], x[j, c])) for c in range(x.shape[1])]))
        else:
            rows.append((x[[j, *own]] * size[[j, *own], None]).sum(0) / size[[j, *own]].sum())
    return sorted(best), torch.stack(rows)


@pytest.mark.parametrize("merge", ["mean", "halving"])
@pytest.mark.parametrize("keep", [1, 7, 19])
def test_equals_its_naive_form(merge, keep):
    x, score = _random(0, 3, 20, 6), _random(1, 3, 20)
    size = torch.randint(1, 5, (3, 20), generator=torch.Generator().manual_seed(2)).float()
    reduction = into_nearest(View.of(x), score, keep, merge, size)
    assert reduction.is_stochastic
    for lane in range(3):
        kept, rows = _naive(x[lane], score[lane].tolist(), size[lane], keep, merge)
        assert reduction.representatives[lane].tolist() == kept
        torch.testing.assert_close(reduction.apply(x)[lane], rows)


def test_of_equal_targets_the_best_takes_the_token():
    x = torch.ones(1, 5, 3)
    reduction = into_nearest(View.of(x), torch.tensor([[0.1, 0.5, 0.2, 0.9, 0.3]]), 2, "mean", torch.ones(1, 5))
    assert reduction.target.tolist() == [[1, 0, 1, 1, 1]]


def test_all_kept_is_the_identity():
    reduction = into_nearest(View.of(_random(0, 2, 6, 3)), _random(1, 2, 6), 6, "mean", torch.ones(2, 6))
    assert reduction.is_selection
    assert reduction.index.tolist() == [list(range(6))] * 2


@pytest.mark.parametrize("merge", ["mean", "halving"])
def test_broken_tokens_go_nowhere(merge):
    x, score = _random(0, 1, 12, 4), _random(1, 1, 12)
    x[0, [2, 5]] = torch.nan
    view = View.of(x)
    reduction = into_nearest(view, score, 4, merge, torch.ones(1, 12))
    assert int(view.notes["nan_scores"]) == 2
    assert not reduction.kept[0, [2, 5]].any()
    assert reduction.apply(x).isfinite().all()
    assert reduction.is_stochastic


def test_weights_of_halving_need_no_host_read():
    owner = torch.tensor([[0, 1, 0, 3, 0]])
    with HostReads():
        others, own = halving_weights(owner, 3)
    assert others[0, [0, 1, 2, 4]].tolist() == [0.125, 0.5, 0.25, 0.5]
    assert own.tolist() == [[0.125, 0.5, 1.0]]
