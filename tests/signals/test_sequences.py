"""What an attention call of a tower shows: each picture with its real tokens, however an implementation keeps them
apart."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import winnow
from winnow.signals.sequences import sequences


class Tower(nn.Module):
    def forward(self, hidden):
        """Reads no cache."""


class LM(nn.Module):
    def forward(self, hidden, past_key_values=None):
        """Reads a cache."""


def tokens(b, n):
    """Values that tell row and token: `[b, 1, n, 1]`."""
    return torch.arange(b * n, dtype=torch.float32).view(b, 1, n, 1)


def shown(mask=None, ends=None, b=2, n=5, module=None):
    q = tokens(b, n)
    parts = list(sequences(module or Tower(), q, q + 100, q + 200, mask, ends))
    for q, k, v in parts:
        assert torch.equal(k, q + 100)
        assert torch.equal(v, q + 200)
    return [q[:, 0, :, 0].tolist() for q, _, _ in parts]


def as_bias(mask):
    return torch.zeros(mask.shape).masked_fill(~mask, torch.finfo(torch.float32).min)


BATCH = [[0, 1, 2, 3, 4], [5, 6, 7, 8, 9]]


@pytest.mark.parametrize("mask", [None, torch.ones(2, 1, 5, 5, dtype=torch.bool), torch.zeros(2, 1, 5, 5)])
def test_a_call_without_padding_is_shown_whole(mask):
    assert shown(mask) == [BATCH]


@pytest.mark.parametrize("made", [lambda m: m, as_bias])
def test_padding_is_not_shown(made):
    """On any side; the queries of padding see what is real, as transformers makes such masks."""
    real = torch.tensor([[True, True, True, False, False], [False, True, True, True, True]])
    assert shown(made(real[:, None, None].expand(2, 1, 5, 5))) == [[[0, 1, 2]], [[6, 7, 8, 9]]]


def test_a_flat_mask_hides_padding():
    real = torch.tensor([[True, True, True, False, False], [True] * 5])
    assert shown(real) == shown(real.long()) == [[[0, 1, 2]], [[5, 6, 7, 8, 9]]]


@pytest.mark.parametrize("made", [lambda m: m, as_bias])
def test_pictures_in_one_sequence_are_shown_apart(made):
    number = torch.tensor([0, 0, 1, 1, 1])
    mask = (number[:, None] == number)[None, None]
    assert shown(made(mask), b=1) == [[[0, 1]], [[2, 3, 4]]]
    assert shown(made(mask), b=2) == [[[0, 1]], [[2, 3, 4]], [[5, 6]], [[7, 8, 9]]]
    assert shown(ends=torch.tensor([0, 2, 5]), b=1) == [[[0, 1]], [[2, 3, 4]]]


def test_other_masks_are_refused():
    with pytest.raises(winnow.UnsupportedError, match="neither padding nor pictures apart"):
        shown(torch.ones(5, 5, dtype=torch.bool).tril()[None, None], b=1)


def test_a_language_model_is_shown_as_it_is():
    mask = torch.ones(5, 5, dtype=torch.bool).tril()[None, None]
    assert shown(mask, module=LM()) == [BATCH]
    assert shown(ends=torch.tensor([0, 2, 5]), b=1, module=LM()) == [BATCH[:1]]
