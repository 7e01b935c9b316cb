"""Signals of the encoder: its pixels, the blocks of the vision tower, and the projector."""

from dataclasses import dataclass
from typing import Any, ClassVar, Literal, Self

import torch
from jaxtyping import Float
from torch import Tensor

from winnow.core.errors import UnsupportedError
from winnow.core.info import ModelInfo
from winnow.core.signal import Signal, Site, block_index
from winnow.signals.attention import attention_rows, column_mean


@dataclass(frozen=True, eq=False)
class TowerAttention:
    """What a signal of a vision block is shown at `shows="attention"`.

    Attributes:
        q, k, v: `[tiles, H, N, d]`, after position embedding; N counts the prefix.
        scaling: of the logits.
        prefix: tokens before the patches that a signal leaves out: 1 with [CLS], else 0. At `blocks` there is a value
            for each token of the tower, and the prefix is 0.
        bias: `[tiles, N]` what is added to the logits of each key (merged tokens weigh by their size); None: nothing.
    """

    q: Float[Tensor, "t h n d"]
    k: Float[Tensor, "t h n d"]
    v: Float[Tensor, "t h n d"]
    scaling: float
    prefix: int
    bias: Float[Tensor, "t n"] | None = None

    def logits(self) -> tuple[Tensor, Tensor, float]:
        """Queries, keys and scaling whose products are the logits: a bias of keys is one more feature of both."""
        if self.bias is None:
            return self.q, self.k, self.scaling
        wide = torch.promote_types(self.q.dtype, torch.float32)
        bias = self.bias.to(wide)[:, None, :, None].expand(-1, self.k.shape[1], -1, 1)
        q = torch.cat([self.q.to(wide) * self.scaling, torch.ones_like(self.q[..., :1], dtype=wide)], -1)
        return q, torch.cat([self.k.to(wide), bias], -1), 1.0


@dataclass(frozen=True, eq=False)
class HiddenStates:
    """What a signal is shown at `shows="hidden"`, and at the projector: what goes into the module and what comes out.

    Attributes:
        before, after: `[tiles, N, D]` in the tower, `[B, P, D]` in the language model. Where the module reads all
            pictures as one sequence, `[1, N, D]`.
        prefix: tokens before the patches, in the tower.
        text_encoder: the text tower that was handed over, if one was.
    """

    before: Tensor
    after: Tensor
    prefix: int = 0
    text_encoder: Any = None

    def __post_init__(self) -> None:
        for name in ("before", "after"):
            if getattr(self, name).ndim == 2:
                object.__setattr__(self, name, getattr(self, name)[None])


@dataclass(frozen=True, eq=False)
class Pixels:
    """What a signal of the input is shown.

    Attributes:
        patches: `[cells, …]` the pixel values of each token's part of the picture, as the encoder is given them.
    """

    patches: Tensor


@dataclass(frozen=True)
class VisionSignal(Signal):
    """A signal of one block of the vision tower.

    Args:
        layer: the block; `"feature"` is the one whose output feeds the projector. Negative counts from the end.
    """

    layer: int | Literal["feature"] = "feature"

    def resolve(self, info: ModelInfo) -> Self:
        return self._with(layer=self.block(info))

    def site(self, info: ModelInfo) -> Site:
        return Site("vision", self.block(info))

    def block(self, info: ModelInfo) -> int:
        """The number of the block, from 0."""
        if not info.vision_depth:
            raise UnsupportedError(
                f"winnow knows no vision tower of {info.model}: some models have none, and the generic adapter sees "
                "none. Use a method that does not look at it (`winnow methods` lists what each looks at)."
            )
        layer = info.feature_layer if self.layer == "feature" else self.layer
        return block_index(layer, info.vision_depth, f"the vision tower of {info.model}")


@dataclass(frozen=True)
class VisionAttention(VisionSignal):
    """Attention that the content tokens receive in one block of the vision tower, `[b, N]`, fp32.

    Args:
        layer: the block; `"feature"` is the one whose output feeds the projector. Negative counts from the end.
        query: `"cls"` reads the row of [CLS]; `"all"` is the mean over all queries of the tile ([CLS] included);
            `"auto"` is `"cls"` where the tower has one, else `"all"`.
        heads: `"mean"` or `"sum"` over heads.

    Where several patches make one token (2 × 2 merging), a token has the mean over its patches.
    """

    query: Literal["cls", "all", "auto"] = "cls"
    heads: Literal["mean", "sum"] = "mean"

    def resolve(self, info: ModelInfo) -> Self:
        if self.query == "cls" and not info.has_cls:
            raise UnsupportedError(
                f"the vision tower of {info.model} has no [CLS] token, so there is no [CLS] attention to read; "
                "use query=auto or query=all where the method offers a choice, or a method that needs no [CLS] "
                "(`winnow methods` lists what each looks at)."
            )
        query = self.query if self.query != "auto" else "cls" if info.has_cls else "all"
        return super().resolve(info)._with(query=query)

    def read(self, seen: TowerAttention) -> Float[Tensor, "t n"]:
        q, k, scaling = seen.logits()
        if self.query == "cls":
            heads = attention_rows(q[:, :, :1], k, scaling)[:, :, 0]
        else:
            heads = column_mean(q, k, scaling)
        return (heads.sum(1) if self.heads == "sum" else heads.mean(1))[:, seen.prefix :]


@dataclass(frozen=True)
class VisionKeys(VisionSignal):
    """Keys of one block of the vision tower, averaged over heads: `[b, N, d]` (with [CLS] at `features`)."""

    covers_prefix: ClassVar[bool] = True

    def read(self, seen: TowerAttention) -> Float[Tensor, "t n d"]:
        return seen.k.to(torch.promote_types(seen.k.dtype, torch.float32)).mean(1)

    def sample(self, generator: torch.Generator, b: int, n: int) -> Tensor:
        return torch.randn(b, n, 8, generator=generator)
