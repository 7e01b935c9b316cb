"""A round of ToMe: how many pairs, what each output holds, and what it weighs."""

from __future__ import annotations

import pytest
import torch

from winnow.core.errors import WinnowError
from winnow.core.layout import Layout
from winnow.core.step import State
from winnow.core.view import View
from winnow.parts.bipartite import bipartite_naive
from winnow.parts.cosine import unit
from winnow.parts.pair_merge import merge_pairs, most_pairs, pairs_to


def _view(n=12, cls=True, seed=0):
    layout = Layout.grid(1, n, cls=cls)
    x = torch.randn(1, layout.n, 6, generator=torch.Generator().manual_seed(seed))
    return View.of(x, layout=layout)


@pytest.mark.parametrize("cls", [True, False])
@pytest.mark.parametrize("r", [1, 3, 6])
def test_outputs_are_means_by_size(r, cls):
    view = _view(cls=cls)
    size = torch.arange(1.0, view.n + 1)[None]
    action, state = merge_pairs(view, State(summed={"size": size}), view.tokens, r)
    (x,), _ = unit(view.tokens)
    groups = bipartite_naive((x @ x.T).tolist(), r, cls)
    want = torch.stack([(size[0, own, None] * view.tokens[0, own]).sum(0) / size[0, own].sum() for own in groups])
    torch.testing.assert_close(action.reduction.apply(view.tokens)[0], want)
    assert action.reduction.representatives[0].tolist() == [own[0] for own in groups]
    torch.testing.assert_close(action.log_bias[0].exp(), torch.stack([size[0, own].sum() for own in groups]))
    assert torch.equal(state.summed["size"], size)


def test_no_pairs_change_nothing_and_broken_tokens_are_counted():
    view = _view()
    view.tokens[0, 3] = torch.nan
    action, state = merge_pairs(view, State(), view.tokens, 0)
    assert action.reduction.index.tolist() == [list(range(13))]
    assert (action.log_bias, state) == (None, State())
    assert int(view.notes["nan_scores"]) == 1


@pytest.mark.parametrize(("left", "blocks"), [(12, 3), (7, 3), (2, 3), (1, 4)])
def test_steps_down_to_a_count(left, blocks):
    n, steps = 12, []
    for block in range(blocks):
        view = _view(n)
        steps.append(pairs_to(View(view.tokens, view.layout, view.ids, 12), left, block, blocks, "this"))
        assert steps[-1] <= most_pairs(view)
        n -= steps[-1]
    assert n == left


def test_a_count_that_halving_cannot_reach_is_refused():
    with pytest.raises(WinnowError, match="this: left=2 of 12; allowed in 2 blocks: 3 and more"):
        pairs_to(_view(), 2, 0, 2, "this")
