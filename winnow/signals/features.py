"""Signals of the tower: what a block gives, and what is compared in a single head as wide as the tower."""

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from jaxtyping import Float
from torch import Tensor

from winnow.core.errors import UnsupportedError
from winnow.core.info import ModelInfo
from winnow.core.signal import Site
from winnow.signals.attention import attention_rows, column_mean
from winnow.signals.vision import HiddenStates, TowerAttention, VisionAttention, VisionSignal


@dataclass(frozen=True)
class VisionFeatures(VisionSignal):
    """What a block of the vision tower gives: `[b, N, C]`.

    Args:
        layer: the block; `"feature"` is the one whose output feeds the projector. Negative counts from the end.
    """

    def site(self, info: ModelInfo) -> Site:
        return Site("vision", self.block(info), shows="hidden")

    def read(self, seen: HiddenStates) -> Float[Tensor, "t n c"]:
        return seen.after[:, seen.prefix :]

    def sample(self, generator: torch.Generator, b: int, n: int) -> Tensor:
        return torch.randn(b, n, 16, generator=generator)


@dataclass(frozen=True)
class ClsLogits(VisionSignal):
    """What [CLS] gives each token in one block of the vision tower before the softmax, mean over heads: `[b, N]`.

    Args:
        layer: the block; negative counts from the end.
    """

    def resolve(self, info: ModelInfo) -> "ClsLogits":
        VisionAttention().resolve(info)  # refuses towers without [CLS]
        return super().resolve(info)

    def read(self, seen: TowerAttention) -> Float[Tensor, "t n"]:
        q, k, scaling = seen.logits()
        wide = torch.promote_types(q.dtype, torch.float32)
        logits = (q[:, :, :1].to(wide) * scaling) @ k.to(wide).transpose(-1, -2)
        return logits[:, :, 0].mean(1)[:, seen.prefix :]


@dataclass(frozen=True)
class OneHeadAttention(VisionSignal):
    """Attention that tokens receive when all heads of a block are one: `[b, N]`, at least fp32.

    Args:
        layer: the block; negative counts from the end.
        query: `"cls"` reads the row of [CLS]; `"all"` is the mean over all queries; `"auto"` is `"cls"` where the tower
            has one, else `"all"`.
    """

    query: Literal["cls", "all", "auto"] = "cls"

    def resolve(self, info: ModelInfo) -> "OneHeadAttention":
        if self.query == "cls" and not info.has_cls:
            raise UnsupportedError(
                f"the vision tower of {info.model} has no [CLS] token, so there is no [CLS] attention to read; use "
                "query=auto or query=all."
            )
        query = self.query if self.query != "auto" else "cls" if info.has_cls else "all"
        return super().resolve(info)._with(query=query)

    def read(self, seen: TowerAttention) -> Float[Tensor, "t n"]:
        q, k = (x.transpose(1, 2).flatten(2)[:, None] for x in (seen.q, seen.k))  # t 1 n (h d)
        scaling = q.shape[-1] ** -0.5
        row = attention_rows(q[:, :, :1], k, scaling)[:, :, 0] if self.query == "cls" else column_mean(q, k, scaling)
        return row[:, 0, seen.prefix :]


@dataclass(frozen=True)
class WideKeys(VisionSignal):
    """Keys of one block of the vision tower, its heads side by side: `[b, N, C]`."""

    covers_prefix: ClassVar[bool] = True

    def read(self, seen: TowerAttention) -> Float[Tensor, "t n c"]:
        return seen.k.transpose(1, 2).flatten(2)

    def sample(self, generator: torch.Generator, b: int, n: int) -> Tensor:
        return torch.randn(b, n, 16, generator=generator)
