"""Signals: what a method looks at, as values that a step lists and reads back from its view.

The engine decides how a signal is obtained without losing fused attention: one row of one block, column sums in
tiles, a tap where the layer has run, a probe where it has not.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from winnow.core.errors import UnsupportedError, WinnowError
from winnow.core.info import ModelInfo


@dataclass(frozen=True)
class Signal:
    """Base of all signals. Equal settings are the same signal, so two methods share one computation.

    Class attributes:
        reads_text: whether it depends on the text.
    """

    reads_text: ClassVar[bool] = False

    def require(self, info: ModelInfo) -> None:
        """Raise UnsupportedError if a model of this kind cannot give the signal."""


def block_index(layer: int | str, depth: int, what: str) -> int:
    """A block number from a signal's `layer`: 0-based, negative from the end."""
    if not isinstance(layer, int) or isinstance(layer, bool) or not -depth <= layer < depth:
        raise WinnowError(f"{what} has blocks 0 … {depth - 1} (or −{depth} … −1); got layer={layer!r}.")
    return layer % depth


@dataclass(frozen=True)
class VisionSignal(Signal):
    """A signal of one block of the vision tower.

    Args:
        layer: the block; `"feature"` is the one whose output feeds the projector. Negative counts from the end.
    """

    layer: int | str = "feature"

    def require(self, info: ModelInfo) -> None:
        self.block(info)

    def block(self, info: ModelInfo) -> int:
        """The number of the block, from 0."""
        layer = info.feature_layer if self.layer == "feature" else self.layer
        return block_index(layer, info.vision_depth, f"the vision tower of {info.model}")


@dataclass(frozen=True)
class VisionAttention(VisionSignal):
    """Attention that the content tokens receive in one block of the vision tower, `[b, N]`, fp32.

    Args:
        layer: the block; `"feature"` is the one whose output feeds the projector. Negative counts from the end.
        query: `"cls"` reads the row of [CLS]; `"all"` is the mean over all queries of the tile ([CLS] included).
        heads: `"mean"` or `"sum"` over heads.

    Where several patches make one token (2 × 2 merging), a token has the mean over its patches.
    """

    query: str = "cls"
    heads: str = "mean"

    def require(self, info: ModelInfo) -> None:
        if self.query not in ("cls", "all"):
            raise WinnowError(f"VisionAttention: query is 'cls' or 'all', got {self.query!r}.")
        if self.heads not in ("mean", "sum"):
            raise WinnowError(f"VisionAttention: heads is 'mean' or 'sum', got {self.heads!r}.")
        if self.query == "cls" and not info.has_cls:
            raise UnsupportedError(
                f"the vision tower of {info.model} has no [CLS] token, so there is no [CLS] attention to read; "
                "use query='all' where the method offers it, or a method that needs no [CLS]: "
                "hiprune, divprune, todre, fastv, pyramiddrop."
            )
        super().require(info)


@dataclass(frozen=True)
class VisionKeys(VisionSignal):
    """Keys of one block of the vision tower, averaged over heads: `[b, N, head_dim]` (with [CLS] at `features`)."""


@dataclass(frozen=True)
class LMAttention(Signal):
    """Attention from text rows to the item's tokens in one LM layer, mean over heads and rows: `[b, N]`, fp32.

    Args:
        layer: the LM layer whose attention is read. Before it has run, the engine probes it; afterwards it taps.
        rows: `"last"` is the last prompt token; `"question"` the mean over the tokens of the question.
    """

    reads_text: ClassVar[bool] = True

    layer: int
    rows: str = "last"

    def require(self, info: ModelInfo) -> None:
        if self.rows not in ("last", "question"):
            raise WinnowError(f"LMAttention: rows is 'last' or 'question', got {self.rows!r}.")
        block_index(self.layer, info.depth, f"the language model of {info.model}")


@dataclass(frozen=True)
class LMAttentionMass(Signal):
    """Share of the attention of some rows that falls on some keys, in one LM layer, mean over heads and rows: `[b]`.

    Args:
        layer: the LM layer.
        rows: `"question"` or `"items"` (all visual tokens of the sample).
        keys: `"items"` or `"question"`.
    """

    reads_text: ClassVar[bool] = True

    layer: int
    rows: str = "question"
    keys: str = "items"

    def require(self, info: ModelInfo) -> None:
        for name in (self.rows, self.keys):
            if name not in ("question", "items"):
                raise WinnowError(f"LMAttentionMass: rows and keys are 'question' or 'items', got {name!r}.")
        block_index(self.layer, info.depth, f"the language model of {info.model}")
