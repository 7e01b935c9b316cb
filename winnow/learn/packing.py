"""Many questions behind one picture: the packed rows that the language model trains on.

A row is the text after the picture's tokens: `question ASSISTANT: answer </s>`, again and again. A mask keeps the
questions from seeing each other, and positions start again with each, so the model sees what it sees when asked once.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from winnow.reference.vocabulary import ASSISTANT, BOS, EOS, TOKEN_ID, USER, token_ids
from winnow.world.names import TYPES

IGNORED = -100


class Asked(Protocol):
    """A question of any of winnow's worlds."""

    @property
    def type(self) -> str: ...
    @property
    def text(self) -> str: ...
    @property
    def answer(self) -> str: ...


@dataclass
class Pack:
    """Rows of packed questions, all [B, T]: `labels` holds the next token where it belongs to an answer.

    `segment` numbers the questions of a row (-1: padding), `kind` is the index of the question's type where a label is
    part of an answer (-1 elsewhere, `</s>` included).
    """

    ids: Tensor
    labels: Tensor
    segment: Tensor
    position: Tensor
    kind: Tensor


def pack(
    rows: Sequence[Sequence[Asked]],
    length: int,
    rng: random.Random | None = None,
    *,
    types: Sequence[str] = TYPES,
    ids: Callable[[str], tuple[int, ...]] = token_ids,
) -> Pack:
    """Pack as many questions of each row as fit into `length` tokens, in random order (in order without `rng`).

    Unused columns are cut off. Segments are numbered in the order of the row's questions when there is no `rng`.
    `types` and `ids` are those of the world and of the vocabulary, which has the reference models' special tokens.
    """
    shape = (len(rows), length)
    out = Pack(
        torch.full(shape, TOKEN_ID["<pad>"]),
        torch.full(shape, IGNORED),
        torch.full(shape, -1),
        torch.zeros(shape, dtype=torch.long),
        torch.full(shape, -1),
    )
    for b, questions in enumerate(rows):
        start = 0
        for number, question in enumerate(rng.sample(list(questions), len(questions)) if rng else questions):
            asked = [*ids(question.text), TOKEN_ID[ASSISTANT]]
            answer = [*ids(question.answer), TOKEN_ID[EOS]]
            end = start + len(asked) + len(answer) - 1  # </s> is predicted, never read
            if end > length:
                continue
            out.ids[b, start:end] = torch.tensor((asked + answer)[:-1])
            out.segment[b, start:end] = number
            out.position[b, start:end] = torch.arange(end - start)
            first = start + len(asked) - 1
            out.labels[b, first:end] = torch.tensor(answer)
            out.kind[b, first : end - 1] = types.index(question.type)
            start = end
    used = max(1, int((out.segment >= 0).sum(1).max()))
    return Pack(*(x[:, :used] for x in (out.ids, out.labels, out.segment, out.position, out.kind)))


def prefix_ids(batch: int) -> Tensor:
    """What stands before the picture: [B, 2]."""
    return torch.tensor([TOKEN_ID[BOS], TOKEN_ID[USER]]).expand(batch, -1)


def additive_mask(segment: Tensor, visual: int, dtype: torch.dtype) -> Tensor:
    """Causal mask [B, 1, N, N], N = 2 + visual + T, in which a question sees the prefix, the picture and itself."""
    batch, text = segment.shape
    before = 2 + visual
    allowed = torch.zeros(batch, before + text, before + text, dtype=torch.bool, device=segment.device)
    allowed[:, :, :before] = True
    allowed[:, before:, before:] = segment[:, :, None] == segment[:, None, :]
    allowed &= torch.ones_like(allowed[0]).tril()
    return torch.zeros(allowed.shape, dtype=dtype, device=segment.device).masked_fill(~allowed, -1e4)[:, None]


def right_by_type(predicted: Tensor, pack: Pack, types: int = len(TYPES)) -> Tensor:
    """[types, 2]: questions right in all tokens before `</s>`, and questions asked, from next-token ids [B, T]."""
    counted = pack.kind >= 0
    rows = torch.arange(len(pack.ids))[:, None].expand_as(pack.ids)
    key = (rows * (int(pack.segment.max()) + 1) + pack.segment)[counted]
    wrong = (predicted != pack.labels)[counted]
    questions, inverse = key.unique(return_inverse=True)
    misses = torch.zeros(len(questions)).index_add_(0, inverse, wrong.float())
    kinds = torch.zeros(len(questions), dtype=torch.long).index_copy_(0, inverse, pack.kind[counted])
    out = torch.zeros(types, 2)
    out[:, 0].index_add_(0, kinds, (misses == 0).float())
    out[:, 1].index_add_(0, kinds, torch.ones(len(questions)))
    return out
