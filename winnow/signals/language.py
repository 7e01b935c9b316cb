"""Signals of the language model: attention to items, in the slots of the moment, computed for a few rows."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Literal, Self

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from winnow.core.errors import UnsupportedError
from winnow.core.info import ModelInfo
from winnow.core.packing import Packing
from winnow.core.signal import Signal, Site, block_index
from winnow.signals.attention import attention_rows

SLOTS = 12  # of a sampled row, and words of a sampled question
TILE = 64  # query rows at a time, so that no tile outgrows the queries of a head

Rows = Literal["last", "question", "items"]


@dataclass(frozen=True, eq=False)
class TextSpans:
    """Which tokens of each row are what, in logical positions and in slots.

    Attributes:
        questions: (start, end) of the question of each row, in logical positions.
        ends: where the last item of each row ends; text behind it is invisible to visual rows.
        items: content slots of each row's items.
    """

    questions: Sequence[tuple[int, int]]
    ends: Sequence[int]
    items: Sequence[Int[Tensor, " _"]]


@dataclass(frozen=True, eq=False)
class LMAttentionInputs:
    """What a signal of an LM layer is shown at `shows="attention"`: queries and keys, and who they belong to.

    Attributes:
        q: `[B, H, P, d]` queries after position embedding, or `[B, H, 1, d]`: only the last token of each row. Those
            that no signal needs (`Signal.queries`) may be NaN.
        k: `[B, G, L + P, d]` keys; those of the cache come first.
        scaling: of the logits.
        packing: the slots in which the queries stand.
        past: `[B, L]` real keys of the cache; None: all are.
        spans: questions and items.
        mask: `[B, 1, P, L + P]` which keys each slot sees, where that is not simply everything before it.
    """

    q: Float[Tensor, "b h r d"]
    k: Float[Tensor, "b g n d"]
    scaling: float
    packing: Packing
    past: Bool[Tensor, "b l"] | None
    spans: TextSpans
    mask: Bool[Tensor, "b 1 p n"] | None = None

    @property
    def before(self) -> int:
        """Keys of the cache."""
        return self.k.shape[2] - self.packing.width

    def received(self, rows: Rows) -> Float[Tensor, "b p"]:
        """Attention that each slot receives from the last token, question or items, mean over heads and rows."""
        return self._from_last() if rows == "last" else self.received_by_head(rows).mean(-1)

    def received_by_head(self, rows: Literal["question", "items"] = "question") -> Float[Tensor, "b p h"]:
        """Attention that each slot receives from the question or from items in each head, mean over rows."""
        at = self._question_slots() if rows == "question" else self.spans.items
        return torch.stack([self._from(b, slots).T for b, slots in enumerate(at)])[:, self.before :]

    def mass(self, rows: Rows, keys: Rows) -> Float[Tensor, " b"]:
        """Share of the attention of some rows that falls on some keys, mean over heads and rows."""
        return torch.stack([self._mass(rows, keys, b) for b in range(self.q.shape[0])])

    def of_row(self, b: int) -> "LMAttentionInputs":
        """What one row of the batch alone would be shown; its spans are still those of all rows."""
        at = slice(b, b + 1)
        past, mask = (None if x is None else x[at] for x in (self.past, self.mask))
        return replace(self, q=self.q[at], k=self.k[at], packing=self.packing.row(b), past=past, mask=mask)

    def visible(self, rows: Int[Tensor, "b r"]) -> Bool[Tensor, "b r n"]:
        """The keys that these query slots may see."""
        if self.mask is not None:
            return self.mask[:, 0].gather(1, rows[..., None].expand(-1, -1, self.mask.shape[-1]))
        slots = torch.arange(self.packing.width, device=rows.device)
        seen = (slots <= rows[..., None]) & self.packing.mask[:, None]
        if not self.before:
            return seen
        past = self.past
        if past is None:
            past = torch.ones(seen.shape[0], self.before, dtype=torch.bool, device=rows.device)
        return torch.cat([past[:, None].expand(-1, rows.shape[1], -1), seen], -1)

    def _from_last(self) -> Float[Tensor, "b p"]:
        at = self.packing.last_slots()
        rows = self.q
        if rows.shape[2] > 1:
            rows = rows.gather(2, at[:, None, None, None].expand(-1, rows.shape[1], 1, rows.shape[3]))
        seen = self.visible(at[:, None])[:, None]
        return attention_rows(rows, self.k, self.scaling, seen).mean(1)[:, 0, self.before :]

    def _question_slots(self) -> list[Int[Tensor, " r"]]:
        return question_slots(self.packing, self.spans.questions)

    def by_head(self, b: int, slots: Int[Tensor, " r"]) -> Iterator[tuple[slice, Float[Tensor, "h t n"]]]:
        """Attention of some slots of sample b to all keys in each head, in tiles: which of them, and their rows."""
        own = self.of_row(b)
        for start in range(0, slots.shape[0], TILE):
            at = slice(start, start + TILE)
            seen = own.visible(slots[None, at])[:, None]
            yield at, attention_rows(own.q[:, :, slots[at]], own.k, self.scaling, seen)[0]

    def rows(self, b: int, slots: Int[Tensor, " r"]) -> Iterator[tuple[slice, Float[Tensor, "t n"]]]:
        """The same, mean over heads."""
        return ((at, rows.mean(0)) for at, rows in self.by_head(b, slots))

    def _from(self, b: int, slots: Int[Tensor, " r"]) -> Float[Tensor, "h n"]:
        """Attention of some rows of sample b to all keys in each head, mean over rows."""
        wide = torch.promote_types(self.k.dtype, torch.float32)
        total = self.k.new_zeros(self.q.shape[1], self.k.shape[2], dtype=wide)
        for _, rows in self.by_head(b, slots):
            total += rows.sum(1)
        return total / max(1, slots.shape[0])

    def _mass(self, rows: Rows, keys: Rows, b: int) -> Float[Tensor, ""]:
        slots = {"question": self._question_slots()[b], "items": self.spans.items[b]}
        at, on = slots[rows], slots[keys]
        unseen = (rows, keys) == ("items", "question") and self.spans.questions[b][0] >= self.spans.ends[b]
        if unseen or not at.shape[0] or not on.shape[0]:
            return self.q.new_zeros((), dtype=torch.promote_types(self.q.dtype, torch.float32))
        return self._from(b, at).mean(0)[self.before :][on].sum()


@dataclass(frozen=True, eq=False)
class LMEntry:
    """What a signal of an LM layer is shown at `shows="entry"`: the rows that are about to go into it.

    Attributes:
        hidden: `[B, P, D]`.
        packing: the slots in which they stand.
        spans: questions and items.
    """

    hidden: Float[Tensor, "b p d"]
    packing: Packing
    spans: TextSpans

    def last_of_question(self, count: int) -> Float[Tensor, "b t d"]:
        """The last `count` rows of each question; where it has fewer, zeros stand before them."""
        found = self.hidden.new_zeros(len(self.spans.questions), count, self.hidden.shape[-1])
        for b, slots in enumerate(question_slots(self.packing, self.spans.questions)):
            own = slots[-count:]
            found[b, count - own.shape[0] :] = self.hidden[b, own]
        return found

    def behind_items(self) -> tuple[Float[Tensor, "b d"], Float[Tensor, "b d"]]:
        """The mean of the rows behind the last item but the very last row (zeros, where there are none), and that row.

        At least in fp32.
        """
        packing, wide = self.packing, self.hidden.to(torch.promote_types(self.hidden.dtype, torch.float32))
        last = packing.last_slots()
        slots = torch.arange(packing.width, device=last.device)
        ends = torch.tensor(self.spans.ends, device=last.device)[:, None]
        text = (packing.mask & (packing.source >= ends) & (slots != last[:, None]))[..., None]
        mean = torch.where(text, wide, 0).sum(1) / text.sum(1).clamp_min(1)
        return mean, wide.gather(1, last[:, None, None].expand(-1, 1, wide.shape[-1]))[:, 0]


def question_slots(packing: Packing, questions: Sequence[tuple[int, int]]) -> list[Int[Tensor, " r"]]:
    """The slots of each sample's question."""
    slots = packing.to_logical()
    return [slots[b, start:end] for b, (start, end) in enumerate(questions)]


def as_visible(mask: Any) -> Bool[Tensor, "b 1 p n"] | None:
    """Which keys each query sees, from the mask that attention is given; None: all before it.

    Raises:
        UnsupportedError: the mask is not a plain one over queries and keys.
    """
    if mask is None:
        return None
    if not isinstance(mask, Tensor) or mask.ndim != 4 or mask.shape[1] != 1:
        raise UnsupportedError(
            "attention to items cannot be read under this attention implementation, whose masks are of another kind; "
            "use attn_implementation='sdpa'."
        )
    return mask if mask.dtype == torch.bool else mask > torch.finfo(mask.dtype).min / 2


@dataclass(frozen=True)
class LMSignal(Signal):
    """A signal of one LM layer.

    Args:
        layer: the layer. If it has run by the time the signal is needed, it is tapped while it runs; the layer that is
            about to run is probed.
    """

    layer: int = 0

    reads_text: ClassVar[bool] = True

    def resolve(self, info: ModelInfo) -> Self:
        return self._with(layer=block_index(self.layer, info.depth, f"the language model of {info.model}"))

    def site(self, info: ModelInfo) -> Site:
        return Site("lm", self.layer)


@dataclass(frozen=True)
class LMAttention(LMSignal):
    """Attention from some rows to the item's tokens in one LM layer, mean over heads and rows: `[b, N]`, fp32.

    Args:
        layer: the LM layer whose attention is read.
        rows: `"last"` is the last prompt token; `"question"` the mean over the tokens of the question; `"items"` that
            over all visual tokens of the sample.
    """

    rows: Rows = "last"

    @property
    def queries(self) -> Literal["all", "question", "last"]:
        return "all" if self.rows == "items" else self.rows

    @property
    def reads_question(self) -> bool:
        return self.rows == "question"

    def read(self, seen: LMAttentionInputs) -> Float[Tensor, "b p"]:
        return seen.received(self.rows)


@dataclass(frozen=True)
class LMKeys(LMSignal):
    """Keys of one LM layer after position embedding, mean over heads: `[b, N, d]`, at least fp32."""

    def read(self, seen: LMAttentionInputs) -> Float[Tensor, "b p d"]:
        keys = seen.k[:, :, seen.before :]
        return keys.to(torch.promote_types(keys.dtype, torch.float32)).mean(1)

    def sample(self, generator: torch.Generator, b: int, n: int) -> Tensor:
        return torch.randn(b, n, 8, generator=generator)


@dataclass(frozen=True)
class LMAttentionMass(LMSignal):
    """Share of the attention of some rows that falls on some keys, in one LM layer, mean over heads and rows: `[b]`.

    Args:
        layer: the LM layer.
        rows: `"question"` or `"items"` (all visual tokens of the sample).
        keys: `"items"` or `"question"`.
    """

    rows: Literal["question", "items"] = "question"
    keys: Literal["items", "question"] = "items"

    per: ClassVar[Literal["token", "item"]] = "item"

    @property
    def reads_question(self) -> bool:
        return True

    def read(self, seen: LMAttentionInputs) -> Float[Tensor, " b"]:
        return seen.mass(self.rows, self.keys)


@dataclass(frozen=True, eq=False)
class LayerModules:
    """What a signal of an LM layer is shown at `shows="hidden"`: what goes into its parts and what comes out.

    Attributes:
        before, after: `[B, P, D]` of the whole layer.
        attention, mlp: (input, output) of the two modules, `[B, P, D]` each.
        mask: `[B, P]` which slots hold tokens; the others are padding, which no signal may count.
        packing: the slots in which they stand.
        spans: questions and items.
        last_norm: the norm behind the last layer; None where there is none that is known.
    """

    before: Float[Tensor, "b p d"]
    after: Float[Tensor, "b p d"]
    attention: tuple[Float[Tensor, "b p d"], Float[Tensor, "b p d"]]
    mlp: tuple[Float[Tensor, "b p d"], Float[Tensor, "b p d"]]
    mask: Bool[Tensor, "b p"]
    packing: Packing
    spans: TextSpans
    last_norm: Callable[[Tensor], Tensor] | None = None
