"""What packed questions read beside a clip's tokens in the sequence: a method's cross-reads without the engine."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from jaxtyping import Bool, Int
from torch import Tensor, nn

from winnow.core.cross_read import CrossRead, Place, Rows
from winnow.core.layout import Layout
from winnow.core.step import State
from winnow.core.view import View
from winnow.engine.cross_seam import Seam
from winnow.parts.cross_attention import GatedHeads, GatedStates
from winnow.signals.tap import Tap

AJAR = 0.2  # of gates, before tanh


@dataclass(frozen=True, eq=False)
class RowMemory:
    """What one row may read.

    Attributes:
        reads, module: of the method.
        fields: what it remembers of the clip: `State.item`, of this row.
        layout: of the clip.
    """

    reads: tuple[CrossRead, ...]
    module: Any
    fields: Mapping[str, Tensor]
    layout: Layout


class PackedReading:
    """One pass of packed rows through the layers.

    Args:
        beside: what each row reads.
        at: `[B, M]` the tokens of the clip that the visual rows stand for.
        there: which of them do not pad; None: all.
        before: rows in front of them. All others are text; what pads behind it is read by nobody.
    """

    def __init__(
        self, beside: Sequence[RowMemory], at: Int[Tensor, "b m"], there: Bool[Tensor, "b m"] | None, before: int
    ) -> None:
        self.beside, self.at, self.there, self.before = beside, at, there, before
        self.queries: dict[int, Tensor] = {}
        self.entered: dict[int, Tensor] = {}
        self.expected: dict[int, Tensor] = {}

    def see(self, layer: int, module: nn.Module, q: Tensor, k: Tensor, v: Tensor, mask: Any) -> None:
        """A tapped layer shows its queries."""
        self.queries[layer] = q

    def added(self, layer: int, place: Place, carried: Tensor) -> Tensor | None:
        """`[B, P, W]` what is added to the rows of a layer."""
        total = torch.zeros_like(carried)
        queries = self.queries.pop(layer, None)
        for row, own in enumerate(self.beside):
            for read in own.reads:
                if (read.layer, read.place) == (layer, place):
                    slots, where = self._slots(row, read.kind == "text", carried.shape[1])
                    asked = None if queries is None else queries[row][:, slots]
                    rows = Rows(carried[row, slots], (own.fields,), asked, module=own.module, **where)
                    total[row, slots] += read.run(rows).to(carried)
        return total

    def _slots(self, row: int, text: bool, length: int) -> tuple[Tensor, dict[str, Any]]:
        end = self.before + self.at.shape[1]
        if text:
            return torch.cat([torch.arange(self.before), torch.arange(end, length)]), {}
        kept = torch.arange(self.at.shape[1]) if self.there is None else self.there[row].nonzero()[:, 0]
        return self.before + kept, {"ids": self.at[row, kept], "layout": self.beside[row].layout}


def memories(reads: tuple[CrossRead, ...], view: View, state: State) -> tuple[RowMemory, ...]:
    """What each row of a view may read, from what a method remembers; nothing where nobody reads."""
    if not reads or not state.item:
        return ()
    fields = ({name: x[row] for name, x in state.item.items()} for row in range(view.b))
    return tuple(RowMemory(reads, view.module, own, view.layout) for own in fields)


@contextmanager
def reading(
    layers: Any,
    memory: Sequence[RowMemory],
    at: Int[Tensor, "b m"],
    there: Bool[Tensor, "b m"] | None,
    before: int,
) -> Iterator[None]:
    """While it holds, packed rows that go through these layers read what is beside them; see `PackedReading`."""
    with ExitStack() as stack:
        now = PackedReading(memory, at, there, before)
        for layer, place in dict.fromkeys((read.layer, read.place) for own in memory[:1] for read in own.reads):
            attention = layers[layer].self_attn
            stack.callback(Seam(layers[layer], attention, layer, place, lambda: now).remove)
            if place == "heads":
                stack.callback(Tap(attention, partial(now.see, layer)).remove)
        yield


@torch.no_grad()
def as_the_layer(reader: GatedHeads | GatedStates, layer: Any) -> None:
    """Norms and projections of what reads become those of the layer in which it reads; its gate opens a little.

    Behind a gate of 0 all else would stand still at first.
    """
    attention, norm = layer.self_attn, layer.input_layernorm.weight
    nn.init.constant_(reader.gate, AJAR)
    reader.beside.norm.weight.copy_(norm)
    pairs = [(reader.beside.k, attention.k_proj), (reader.beside.v, attention.v_proj)]
    if isinstance(reader, GatedStates):
        reader.norm.weight.copy_(norm)
        pairs += [(reader.q, attention.q_proj), (reader.out, attention.o_proj)]
    else:
        nn.init.zeros_(reader.open.weight)
        nn.init.ones_(reader.open.bias)  # all rows alike
    for own, like in pairs:
        own.weight.copy_(like.weight)
        if own.bias is not None:
            own.bias.copy_(torch.zeros(()) if like.bias is None else like.bias)
