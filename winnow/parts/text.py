"""Signals of an LM layer about the text behind the pictures: how its tokens attend, and the norms of keys.

Text is what stands behind the row's last item: the question and what the chat template puts after it. Where nothing
does, the last token of the row stands for it.
"""

from dataclasses import dataclass, replace
from typing import ClassVar, Literal

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from winnow.core.info import ModelInfo
from winnow.signals.attention import attention_rows
from winnow.signals.language import TILE, LayerModules, LMAttentionInputs, LMSignal

HELD = 12  # slots of a row in samples for tests


def text_mask(seen: LMAttentionInputs) -> Bool[Tensor, "b p"]:
    """Which slots hold text behind the row's last item."""
    ends = torch.tensor(list(seen.spans.ends), device=seen.k.device)
    text = seen.packing.mask & (seen.packing.source >= ends[:, None])
    last = torch.zeros_like(text).scatter_(1, seen.packing.last_slots()[:, None], True)
    return text | (last & ~text.any(1, keepdim=True))


@dataclass(frozen=True)
class TextAttention(LMSignal):
    """Attention from the text behind the pictures to the item's tokens in one LM layer: `[b, N, 2]`, fp32.

    The mean over heads; of each token the sum over all tokens of the text, and the maximum.
    """

    def read(self, seen: LMAttentionInputs) -> Float[Tensor, "b p 2"]:
        text = text_mask(seen)
        return torch.stack([_sum_and_max(seen, text, row) for row in range(len(seen.packing.sizes))])

    def sample(self, generator: torch.Generator, b: int, n: int) -> Tensor:
        rows = torch.randn(b, 5, n, generator=generator).mul(2).softmax(-1)
        return torch.stack([rows.sum(1), rows.amax(1)], -1)


def _sum_and_max(seen: LMAttentionInputs, text: Bool[Tensor, "b p"], row: int) -> Float[Tensor, "p 2"]:
    at = slice(row, row + 1)
    past, mask = (None if x is None else x[at] for x in (seen.past, seen.mask))
    own = replace(seen, q=seen.q[at], k=seen.k[at], packing=seen.packing.row(row), past=past, mask=mask)
    # Positions from the item's last on, padding among them: which of them are text is known on the device alone.
    start = max(0, seen.spans.ends[row] - 1)
    slots = own.packing.to_logical()[0, start:]
    real = own.packing.real[0, start:] & text[row, slots]
    total = seen.k.new_zeros(seen.k.shape[2], dtype=torch.promote_types(seen.k.dtype, torch.float32))
    most = total.clone()
    for part, live in zip(slots.split(TILE), real.split(TILE), strict=True):
        weights = attention_rows(own.q[:, :, part], own.k, seen.scaling, own.visible(part[None])[:, None]).mean(1)[0]
        weights = weights.masked_fill(~live[:, None], 0)
        total += weights.sum(0)
        most = torch.maximum(most, weights.amax(0))
    return torch.stack([total, most], -1)[seen.before :]


def _norms(seen: LMAttentionInputs) -> Float[Tensor, "b p"]:
    k = seen.k[:, :, seen.before :]
    return k.to(torch.promote_types(k.dtype, torch.float32)).abs().sum((1, 3))


@dataclass(frozen=True)
class KeyNorm(LMSignal):
    """The L1 norm of the item's keys in one LM layer, all heads together, after rotation: `[b, N]`, fp32."""

    def read(self, seen: LMAttentionInputs) -> Float[Tensor, "b p"]:
        return _norms(seen)


@dataclass(frozen=True)
class TextKeyNorm(LMSignal):
    """The L1 norm of the keys of all slots of the row that hold text behind the pictures: `[b, P]`; −inf elsewhere."""

    per: ClassVar[Literal["token", "item"]] = "item"

    def read(self, seen: LMAttentionInputs) -> Float[Tensor, "b p"]:
        return _norms(seen).masked_fill(~text_mask(seen), -torch.inf)

    def sample(self, generator: torch.Generator, b: int, n: int) -> Tensor:
        return torch.rand(b, HELD, generator=generator)


@dataclass(frozen=True)
class RowStates(LMSignal):
    """What an LM layer gives for all slots of the item's row, text included: `[b, P, D]`.

    Args:
        layer: the LM layer.
        width: of the LM; filled in for the model.
    """

    width: int = 0

    per: ClassVar[Literal["token", "item"]] = "item"

    def resolve(self, info: ModelInfo) -> "RowStates":
        return super().resolve(info)._with(width=info.width)

    def site(self, info: ModelInfo):
        return replace(super().site(info), shows="hidden")

    def read(self, seen: LayerModules) -> Float[Tensor, "b p d"]:
        return seen.after

    def sample(self, generator: torch.Generator, b: int, n: int) -> Tensor:
        return torch.randn(b, HELD, self.width, generator=generator)
