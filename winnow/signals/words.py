"""Signals of the language model's text: which words rate the picture, what they attend to, and their keys."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from winnow.core.info import ModelInfo
from winnow.core.packing import Packing
from winnow.core.signal import Site
from winnow.signals.language import SLOTS, LayerModules, LMAttentionInputs, LMSignal, TextSpans
from winnow.signals.layers import key_norms

Text = Literal["question", "all"]


def text_of(packing: Packing, spans: TextSpans, text: Text) -> tuple[list[Int[Tensor, " _"]], Bool[Tensor, "b t"]]:
    """The slots of each row's text, and which of them hold a token, padded to the longest text; none without items.

    Args:
        text: `"question"`, or `"all"` that follows the last item, what a chat template adds included; where nothing
            does, the last token of the row stands for it.
    """
    bounds: Sequence[tuple[int, int]] = spans.questions
    if text == "all":
        bounds = [(min(end, packing.logical - 1), packing.logical) for end in spans.ends]
    bounds = [pair if items.shape[0] else (0, 0) for pair, items in zip(bounds, spans.items, strict=True)]
    logical, last = packing.to_logical(), packing.last_slots()
    longest = max((end - start for start, end in bounds), default=0)
    slots = [logical[b, start:end] for b, (start, end) in enumerate(bounds)]
    real = torch.zeros(len(bounds), longest, dtype=torch.bool, device=logical.device)
    for b, (start, end) in enumerate(bounds):
        real[b, : end - start] = packing.real[b, start:end]
        if text == "all" and end > start:
            nothing = ~real[b].any()
            slots[b][0] = torch.where(nothing, last[b], slots[b][0])
            real[b, 0] |= nothing
    return slots, real


def text_mask(packing: Packing, spans: TextSpans) -> Bool[Tensor, "b p"]:
    """Which slots hold text behind the row's last item."""
    slots, real = text_of(packing, spans, "all")
    held = torch.zeros_like(packing.source)
    for b, own in enumerate(slots):
        held[b].scatter_reduce_(0, own, real[b, : own.shape[0]].long(), "amax")
    return held > 0


def raters(words: Float[Tensor, "t d"], picture: Float[Tensor, "v d"], real: Bool[Tensor, " t"]) -> Bool[Tensor, " t"]:
    """Words to which visual tokens are more alike than to the mean word: softmax over the words, mean over the tokens.

    All words where none is above the mean.
    """
    alike = (picture @ words.T).masked_fill(~real, -torch.inf).softmax(-1).mean(0)
    above = real & (alike > alike.sum() / real.sum())
    return torch.where(above.any(), above, real)


@dataclass(frozen=True)
class TextRaters(LMSignal):
    """The words that rate the picture, by their likeness to visual tokens before an LM layer: `[b, T]`, 0 or 1.

    Args:
        layer: the layer whose input is compared; it has run when the signal is used.
        text: `"question"`, or `"all"` text behind the last item.
    """

    text: Text = "question"

    per: ClassVar[Literal["token", "item"]] = "item"

    @property
    def reads_question(self) -> bool:
        return self.text == "question"

    def site(self, info: ModelInfo) -> Site:
        return Site("lm", self.layer, "hidden")

    def read(self, seen: LayerModules) -> Float[Tensor, "b t"]:
        wide = torch.promote_types(seen.before.dtype, torch.float32)
        slots, real = text_of(seen.packing, seen.spans, self.text)
        found = torch.zeros(real.shape, dtype=wide, device=real.device)
        for b, (own, items) in enumerate(zip(slots, seen.spans.items, strict=True)):
            if own.shape[0]:
                x = seen.before[b].to(wide)
                found[b, : own.shape[0]] = raters(x[own], x[items], real[b, : own.shape[0]]).to(wide)
        return found

    def sample(self, generator: torch.Generator, b: int, n: int) -> Tensor:
        return (torch.rand(b, SLOTS, generator=generator) > 0.5).float()


@dataclass(frozen=True)
class WordAttention(LMSignal):
    """Attention from each word to the item's tokens in one LM layer, mean over heads: `[b, N, T]`, fp32.

    Words that a row does not have attend to nothing (0).

    Args:
        layer: the LM layer whose attention is read.
        text: `"question"`, or `"all"` text behind the last item.
    """

    text: Text = "question"

    @property
    def reads_question(self) -> bool:
        return self.text == "question"

    def read(self, seen: LMAttentionInputs) -> Float[Tensor, "b p t"]:
        slots, real = text_of(seen.packing, seen.spans, self.text)
        wide = torch.promote_types(seen.q.dtype, torch.float32)
        found = torch.zeros(*real.shape, seen.packing.width, dtype=wide, device=seen.q.device)
        for b, own in enumerate(slots):
            for at, weights in seen.rows(b, own):
                found[b, at][: len(weights)] = weights[:, seen.before :]
        return found.mul_(real[..., None]).mT

    def sample(self, generator: torch.Generator, b: int, n: int) -> Tensor:
        return torch.randn(b, n, SLOTS, generator=generator).mul(2).softmax(1)


@dataclass(frozen=True)
class TextAttention(LMSignal):
    """Attention from all text behind the last item to the item's tokens in one LM layer: `[b, N, 2]`, fp32.

    The mean over heads; of each token the sum over the words, and the maximum. What `WordAttention` gives of every
    word is not kept.
    """

    def read(self, seen: LMAttentionInputs) -> Float[Tensor, "b p 2"]:
        slots, real = text_of(seen.packing, seen.spans, "all")
        wide = torch.promote_types(seen.q.dtype, torch.float32)
        found = torch.zeros(2, len(slots), seen.packing.width, dtype=wide, device=seen.q.device)
        for b, own in enumerate(slots):
            for at, weights in seen.rows(b, own):
                live = weights[:, seen.before :].masked_fill(~real[b, : own.shape[0]][at, None], 0)
                found[0, b] += live.sum(0)
                found[1, b] = torch.maximum(found[1, b], live.amax(0))
        return found.movedim(0, -1)

    def sample(self, generator: torch.Generator, b: int, n: int) -> Tensor:
        rows = torch.randn(b, SLOTS, n, generator=generator).mul(2).softmax(-1)
        return torch.stack([rows.sum(1), rows.amax(1)], -1)


@dataclass(frozen=True)
class TextKeyNorm(LMSignal):
    """The L1 norms of the keys of the text behind the last item, by slots of the row: `[b, P]`; −inf elsewhere."""

    per: ClassVar[Literal["token", "item"]] = "item"

    def read(self, seen: LMAttentionInputs) -> Float[Tensor, "b p"]:
        return key_norms(seen).masked_fill(~text_mask(seen.packing, seen.spans), -torch.inf)

    def sample(self, generator: torch.Generator, b: int, n: int) -> Tensor:
        return torch.rand(b, SLOTS, generator=generator)
