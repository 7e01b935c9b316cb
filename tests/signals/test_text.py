"""Signals about the text behind the pictures equal what whole attention matrices and plain loops give."""

from __future__ import annotations

import pytest
import torch

from winnow.core.info import ModelInfo
from winnow.core.packing import Packing
from winnow.signals.language import LMAttentionInputs, TextSpans
from winnow.signals.layers import KeyNorm, RowStates
from winnow.signals.words import TextAttention, TextKeyNorm

ENDS = (5, 3)


def _seen(mask, *, right=False, before=0, ends=ENDS, heads=4, groups=2, d=8):
    """Random queries and keys for rows with padding; `mask` says which logical positions are tokens."""
    generator = torch.Generator().manual_seed(1)
    b, p = mask.shape
    packing = Packing.of(mask, tuple(mask.sum(1).tolist()), right)
    q = torch.randn(b, heads, p, d, generator=generator)
    k = torch.randn(b, groups, before + p, d, generator=generator)
    spans = TextSpans([(0, 1)] * b, ends, [torch.arange(1)] * b)
    return LMAttentionInputs(q, k, 0.4, packing, None, spans)


def _text(seen, row):
    return [s for s in range(seen.packing.width) if seen.packing.mask[row, s] and s >= seen.spans.ends[row]]


def _weights(seen, row):
    """`[P, L + P]` the whole matrix, mean over heads."""
    k = seen.k[row].repeat_interleave(seen.q.shape[1] // seen.k.shape[1], 0)
    logits = seen.q[row] @ k.mT * seen.scaling
    width, before = seen.packing.width, seen.before
    own = torch.ones(width, width, dtype=torch.bool).tril() & seen.packing.mask[row]
    visible = torch.cat([torch.ones(width, before, dtype=torch.bool), own], 1)
    return logits.masked_fill(~visible, -torch.inf).softmax(-1).mean(0)


LEFT = torch.tensor([[0, 0, 1, 1, 1, 1, 1, 1, 1], [1, 1, 1, 1, 1, 1, 1, 1, 1]]).bool()
RIGHT = LEFT.flip(1)


@pytest.mark.parametrize(("mask", "right"), [(LEFT, False), (RIGHT, True)], ids=["left", "right"])
@pytest.mark.parametrize("before", [0, 3])
def test_sums_and_maxima_of_the_text_rows(mask, right, before):
    seen = _seen(mask, right=right, before=before)
    found = TextAttention(0).read(seen)
    for row in range(2):
        rows = _weights(seen, row)[_text(seen, row)][:, before:]
        torch.testing.assert_close(found[row, :, 0], rows.sum(0))
        torch.testing.assert_close(found[row, :, 1], rows.amax(0))


def test_more_rows_than_a_tile():
    seen = _seen(torch.ones(1, 150, dtype=torch.bool), ends=(10,))
    rows = _weights(seen, 0)[10:]
    torch.testing.assert_close(TextAttention(0).read(seen)[0], torch.stack([rows.sum(0), rows.amax(0)], -1))


def test_behind_dropped_tokens_the_text_is_still_the_text():
    seen = _seen(torch.ones(1, 9, dtype=torch.bool), ends=(5,))
    kept = torch.tensor([[1, 0, 0, 1, 0, 1, 1, 1, 1]]).bool()
    packing, slots = seen.packing.select(kept, (6,))
    at = slots[:, None, :, None].expand(-1, 4, -1, 8)
    short = LMAttentionInputs(seen.q.gather(2, at), seen.k.gather(2, at[:, :2]), 0.4, packing, None, seen.spans)
    k = short.k[0].repeat_interleave(2, 0)
    weights = (short.q[0] @ k.mT * 0.4).masked_fill(~torch.ones(6, 6, dtype=torch.bool).tril(), -torch.inf)
    rows = weights.softmax(-1).mean(0)[2:]
    torch.testing.assert_close(TextAttention(0).read(short)[0, :, 0], rows.sum(0))
    assert TextKeyNorm(0).read(short).isfinite().tolist() == [[False, False, True, True, True, True]]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_norms_of_keys_leave_out_the_cache_and_what_is_not_text(dtype):
    seen = _seen(LEFT, before=2)
    seen = LMAttentionInputs(seen.q.to(dtype), seen.k.to(dtype), 0.4, seen.packing, None, seen.spans)
    norms = KeyNorm(0).read(seen)
    assert norms.dtype == torch.float32
    torch.testing.assert_close(norms, seen.k[:, :, 2:].float().transpose(1, 2).flatten(2).norm(p=1, dim=-1))
    words = TextKeyNorm(0).read(seen)
    for row in range(2):
        text = _text(seen, row)
        assert words[row].isfinite().nonzero()[:, 0].tolist() == text
        assert torch.equal(words[row, text], norms[row, text])


@pytest.mark.parametrize(("mask", "right", "last"), [(LEFT, False, 8), (RIGHT, True, 6)], ids=["left", "right"])
def test_where_nothing_follows_the_last_token_stands_for_the_text(mask, right, last):
    """The item ends where the row's tokens do."""
    seen = _seen(mask, right=right, ends=(last + 1, 9))
    assert TextKeyNorm(0).read(seen).isfinite().nonzero().tolist() == [[0, last], [1, 8]]
    found = TextAttention(0).read(seen)
    for row, slot in enumerate((last, 8)):
        torch.testing.assert_close(found[row, :, 0], _weights(seen, row)[slot])
        torch.testing.assert_close(found[row, :, 1], _weights(seen, row)[slot])


def test_states_are_sampled_at_the_width_of_the_model():
    signal = RowStates(1).resolve(ModelInfo(depth=3, width=24))
    assert signal.site(ModelInfo()).shows == "hidden"
    assert signal.sample(torch.Generator(), 2, 5).shape[::2] == (2, 24)
