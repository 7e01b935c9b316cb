"""Slow and fast paths of a block: the core of ToC3D."""

from __future__ import annotations

import pytest
import torch

from winnow.learn.detection.blocks import Block
from winnow.parts.slow_fast import shares, slow_fast, slow_fast_naive


def made(b=2, seed=0):
    torch.manual_seed(seed)
    block = Block(16, 2, 4).eval()
    x = torch.randn(b, 16, 16)
    score = torch.nn.functional.logsigmoid(torch.randn(b, 16))
    return block, x, score


def run(path, block, x, score, keep, **more):
    with torch.no_grad():
        return path(x, score, keep, block.attention, block.update, **more)


def plain(block, x):
    places = torch.arange(16).expand(len(x), -1)
    with torch.no_grad():
        x = x + block.attention(x, places)
        return x + block.update(x)


def _keeps_all(path):
    block, x, score = made()
    assert torch.equal(run(path, block, x, score, 16), plain(block, x))


def _same_update_for_all_dropped(path):
    """And kept ones have others of their own; the grid keeps its shape and its order."""
    block, x, score = made()
    out = run(path, block, x, score, 5)
    assert out.shape == x.shape
    for b in range(2):
        order = score[b].argsort(descending=True)
        update = out[b] - x[b]
        torch.testing.assert_close(update[order[5:]], update[order[5]].expand(11, -1))
        assert (update[order[:5]] - update[order[5]]).abs().amax(1).min() > 1e-3


def _passes_what_the_block_makes_of_the_representative(path):
    block, x, score = made(b=1)
    order = score[0].argsort(descending=True)
    kept, rest = order[:5].sort().values, order[5:]
    weight = score[0, rest].exp() / score[0, rest].exp().sum()
    rows = torch.cat([x[0, kept], (weight[:, None] * x[0, rest]).sum(0, keepdim=True)])[None]
    places = torch.tensor([[*kept.tolist(), 5]])
    with torch.no_grad():
        after = rows + block.attention(rows, places)
        after = after + block.update(after)
    out = run(path, block, x, score, 5)
    torch.testing.assert_close(out[0, kept], after[0, :-1])
    torch.testing.assert_close(out[0, rest] - x[0, rest], (after - rows)[0, -1:].expand(11, -1), atol=1e-5, rtol=1e-4)


CHECKS = (_keeps_all, _same_update_for_all_dropped, _passes_what_the_block_makes_of_the_representative)


@pytest.mark.system("toc3d", "exact")
@pytest.mark.parametrize("check", CHECKS)
def test_by_the_card(check):
    check(slow_fast)


def _first(x, score, keep, attention, mlp):
    ranks = -torch.arange(x.shape[1]).expand_as(score).float()
    return slow_fast(x, torch.where(ranks > -keep, 0, score - 99), keep, attention, mlp)


def _untouched(x, score, keep, attention, mlp):
    return x


def _dropped_stay(x, score, keep, attention, mlp):
    whole = slow_fast(x, score, keep, attention, mlp)
    mask = torch.zeros_like(score, dtype=torch.bool).scatter(1, score.topk(keep, 1).indices, True)
    return torch.where(mask[..., None], whole, x)


@pytest.mark.parametrize("stub", [_first, _untouched, _dropped_stay])
def test_the_checks_fail_for_a_stub(stub):
    failed = 0
    for check in CHECKS:
        try:
            check(stub)
        except AssertionError:
            failed += 1
    assert failed


@pytest.mark.system("toc3d", "exact")
@pytest.mark.parametrize("legacy", [False, True])
@pytest.mark.parametrize("keep", [1, 7, 16])
def test_it_is_what_the_naive_form_does(keep, legacy):
    block, x, score = made(seed=3)
    fast, naive = (run(path, block, x, score, keep, legacy=legacy) for path in (slow_fast, slow_fast_naive))
    torch.testing.assert_close(fast, naive, atol=1e-5, rtol=1e-4)


def test_as_released_the_least_salient_weighs_most():
    score = torch.tensor([[0.9, 0.5, 0.1]]).log()
    assert shares(score)[0].argmax() == 0
    assert shares(score, legacy=True)[0].argmax() == 2
    torch.testing.assert_close(shares(score, legacy=True).sum(1), torch.ones(1))


def test_ties_go_to_the_first_tokens():
    block, x, score = made()
    flat = torch.zeros_like(score)
    out = run(slow_fast, block, x, flat, 4)
    update = out - x
    torch.testing.assert_close(update[:, 4:], update[:, 4:5].expand(-1, 12, -1))


def test_a_batch_is_its_items():
    block, x, score = made()
    both = run(slow_fast, block, x, score, 6)
    singles = torch.cat([run(slow_fast, block, x[i : i + 1], score[i : i + 1], 6) for i in range(2)])
    torch.testing.assert_close(both, singles, atol=1e-6, rtol=1e-5)
