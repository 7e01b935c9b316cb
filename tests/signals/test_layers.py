"""PageRank over an LM layer's attention, and states behind the last norm, on plain tensors."""

from __future__ import annotations

import pytest
import torch

from winnow.core.errors import UnsupportedError
from winnow.core.packing import Packing
from winnow.signals.language import LayerModules, LMAttentionInputs, TextSpans
from winnow.signals.layers import LayerStates, PageRank, page_rank_naive

SPANS = TextSpans([], [], [])


def _random(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def _logits(q, k, scaling):
    """Causal logits of one row, `[H, t, t]`; each key head serves as many query heads."""
    logits = torch.einsum("hqd,hkd->hqk", q, k.repeat_interleave(len(q) // len(k), 0)) * scaling
    return logits.masked_fill(torch.ones(q.shape[1], q.shape[1], dtype=torch.bool).triu(1), -torch.inf)


@pytest.mark.system("aim", "exact")
@pytest.mark.parametrize("damping", [0.0, 0.15])
def test_rank_equals_the_whole_matrices(damping):
    for seed in range(3):
        q, k = _random(4, 20, 8, seed=seed), _random(2, 20, 8, seed=seed + 9)
        hidden = torch.ones(20, 20, dtype=torch.bool).triu(1)
        want = page_rank_naive(_logits(q, k, 0.35).double(), 0.1, 5, damping)
        found = PageRank(3, damping=damping).rank(q, k, 0.35, hidden)
        torch.testing.assert_close(found.double(), want, rtol=1e-4, atol=1e-7)


@pytest.mark.system("aim", "exact")
def test_worth_of_a_head_sums_to_one_and_is_that_of_the_fifth_power():
    q, k = _random(1, 12, 8), _random(1, 12, 8, seed=1)
    found = PageRank(0).rank(q, k, 1.0, torch.ones(12, 12, dtype=torch.bool).triu(1))
    assert float(found.sum()) == pytest.approx(1)
    votes = (_logits(q, k, 10.0)[0]).softmax(-1)
    torch.testing.assert_close(found, torch.full((12,), 1 / 12) @ torch.linalg.matrix_power(votes, 5))


@pytest.mark.parametrize("right", [False, True])
def test_padding_has_no_vote_and_no_worth(right):
    mask = torch.ones(2, 9, dtype=torch.bool)
    mask[1, 7:] = False
    mask = mask if right else mask.flip(1)
    q, k = _random(2, 4, 9, 8), _random(2, 2, 9, 8, seed=1)
    seen = LMAttentionInputs(q, k, 0.3, Packing.of(mask, (9, 7), right), None, SPANS)
    found = PageRank(0).read(seen)
    for b in range(2):
        own = mask[b]
        want = page_rank_naive(_logits(q[b][:, own], k[b][:, own], 0.3), 0.1, 5, 0.0)
        torch.testing.assert_close(found[b, own], want)
        assert not found[b, ~own].any()


def test_keys_of_a_cache_take_no_part():
    q, k = _random(1, 4, 6, 8), _random(1, 2, 9, 8, seed=1)
    packing = Packing.of(torch.ones(1, 6, dtype=torch.bool), (6,))
    found = PageRank(0).read(LMAttentionInputs(q, k, 0.3, packing, None, SPANS))
    alone = PageRank(0).read(LMAttentionInputs(q, k[:, :, 3:], 0.3, packing, None, SPANS))
    assert torch.equal(found, alone)


def test_states_go_through_the_last_norm_if_asked():
    x = _random(2, 5, 4)
    mask = torch.ones(2, 5, dtype=torch.bool)
    parts = x - 1, x, (x, x), (x, x), mask, Packing.of(mask, (5, 5)), SPANS
    assert torch.equal(LayerStates(0).read(LayerModules(*parts)), x)
    assert torch.equal(LayerStates(0, norm=True).read(LayerModules(*parts, lambda x: x * 2)), x * 2)
    with pytest.raises(UnsupportedError, match="norm=false"):
        LayerStates(0, norm=True).read(LayerModules(*parts))
