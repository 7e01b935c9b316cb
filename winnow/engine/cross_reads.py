"""Cross-reads: what rows of the language model read of that which methods keep of items beside the sequence.

What is read belongs to samples. It waits on the cache, so that decoded tokens and later turns read it as well, and
moves with the rows of the cache.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from winnow.core.cross_read import CrossRead, Place, Rows
from winnow.core.errors import UnsupportedError, WinnowError
from winnow.engine.bound_model import BoundModel
from winnow.engine.bound_plan import BoundPlan
from winnow.engine.checkpointing import is_checkpointed
from winnow.engine.cross_seam import Seam
from winnow.engine.item_tokens import LMTokens
from winnow.engine.request import Attachment

_BESIDE = "reads tokens beside the sequence inside the language model"


@dataclass(frozen=True, eq=False)
class Memory:
    """What a method keeps of one item.

    Attributes:
        reads: who reads it, and how.
        module: what the method built.
        fields: `State.item`, without its first axis.
    """

    reads: tuple[CrossRead, ...]
    module: Any
    fields: Mapping[str, Tensor]

    @property
    def nbytes(self) -> int:
        return sum(x.nbytes for x in self.fields.values())


Memories = tuple[tuple[Memory, ...], ...]  # of each sample


def all_reads(plan: BoundPlan) -> tuple[CrossRead, ...]:
    """The cross-reads of all methods of a plan."""
    return tuple(read for own in plan.cross_reads.values() for read in own)


def check_reads(bound: BoundModel, plan: BoundPlan) -> None:
    """Refuse models in which nothing can be read beside the sequence.

    Raises:
        UnsupportedError: and what can be done.
    """
    if not plan.cross_reads:
        return
    name = bound.info.model
    if bound.family.cross or set(bound.kinds) != {"full_attention"}:
        raise UnsupportedError(
            f"{plan.plan} {_BESIDE}, which is built for layers that all attend to everything before; {name} has other "
            "ones. Use a method that acts at projected."
        )
    if plan.deaf and "audio" in bound.info.modalities:
        raise UnsupportedError(
            f"{plan.plan} {_BESIDE}, where {name} may carry sounds, which it would take for text; use a method that "
            "acts at projected."
        )
    for read in all_reads(plan):
        layer = bound.layers[bound.info.lm_layer(read.layer)]
        Seam(layer, bound.attention_of(read.layer), read.layer, read.place, lambda: None).remove()


def listen(plan: BoundPlan, attachment: Attachment, running: Callable[[], Any]) -> list[Callable[[], None]]:
    """Put in place what a plan's cross-reads need and is not there yet; returns how to take it away.

    Args:
        running: gives the pass through the language model that is running, or None.
    """
    removers: list[Callable[[], None]] = []
    bound = attachment.bound

    def passing() -> CrossReading | None:
        lm = running()
        return None if lm is None else lm.reading

    for layer, place in dict.fromkeys((read.layer, read.place) for read in all_reads(plan)):
        if (layer, place) in attachment.reads:
            continue
        seam = Seam(bound.layers[layer], bound.attention_of(layer), layer, place, passing)
        attachment.reads.add((layer, place))
        removers += [seam.remove, partial(attachment.reads.discard, (layer, place))]
    return removers


class CrossReading:
    """The cross-reads of one pass through the language model.

    Args:
        lm: the pass.
        held: what its cache remembers of each sample.

    Attributes:
        queries: layer → `[B, H, P, d]` of this forward.
    """

    def __init__(self, lm: Any, held: Memories) -> None:
        self.lm, self.held = lm, held
        self.queries: dict[int, Tensor] = {}
        self.entered: dict[int, Tensor] = {}
        self.expected: dict[int, Tensor] = {}
        self._text: tuple[Any, list[Any]] = (None, [])

    @staticmethod
    def of(lm: Any) -> CrossReading | None:
        """None where nothing is read.

        Raises:
            WinnowError: the cache remembers what this model, as it is compressed now, cannot read.
            UnsupportedError: several samples in a row, or layers that run again in the backward pass.
        """
        held: Memories | None = None if lm.state is None else lm.state.memories
        if not lm.plan.cross_reads and held is None:
            return None
        rows = len(lm.tokens.packing.sizes)
        held = ((),) * rows if held is None else held
        wanted = {(read.layer, read.place) for own in held for memory in own for read in memory.reads}
        if wanted - lm.request.attachment.reads or len(held) != rows:
            raise WinnowError(
                f"this cache holds what {len(held)} samples read beside the sequence, and the model is compressed with "
                f"another plan now, or was called with {rows} samples; go on with the plan and the rows that it was "
                "made with, or start with a new cache."
            )
        if lm.tokens.segments is not None:
            raise UnsupportedError(
                f"{lm.plan.plan} {_BESIDE}, which belong to one sample of a row; give each sample a row of its own."
            )
        if torch.is_grad_enabled() and any(map(is_checkpointed, lm.bound.layers)):
            raise UnsupportedError(
                f"{lm.plan.plan} {_BESIDE}, whose checkpointed layers run again without it in the backward pass; call "
                "model.gradient_checkpointing_disable()."
            )
        return CrossReading(lm, held)

    def memories(self) -> Memories:
        """What each sample remembers by now."""
        found = [list(own) for own in self.held]
        for item in self.lm.items:
            found[item.row] += self._of(item)
        return tuple(map(tuple, found))

    def _of(self, item: LMTokens) -> list[Memory]:
        """What methods remember of an item that came with this pass."""
        plan, found = self.lm.plan, []
        for number, reads in plan.cross_reads.items():
            state = item.states.get(number)
            if state is not None and state.item:
                fields = {name: x[0] for name, x in state.item.items()}
                found.append(Memory(reads, plan.modules.get(number), fields))
        return found

    def added(self, layer: int, place: Place, carried: Tensor) -> Tensor | None:
        """`[B, P, W]` what is added to the rows of a layer; None where nothing is read."""
        total: Tensor | None = None
        for read, row, slots, rows in self._asked(layer, place, carried):
            total = torch.zeros_like(carried) if total is None else total
            total[row, slots] += read.run(rows).to(carried)
        self.queries.pop(layer, None)
        return total

    def _asked(self, layer: int, place: Place, carried: Tensor) -> Iterator[tuple[CrossRead, int, Any, Rows]]:
        """The cross-reads of a layer: the sample, its slots, and what is seen of them."""
        for row, own in enumerate(self.memories()):
            together: dict[tuple[int, int], list[Memory]] = {}
            for memory in own:
                together.setdefault((id(memory.reads), id(memory.module)), []).append(memory)
            for group in together.values():
                for read in group[0].reads:
                    if (read.layer, read.kind, read.place) == (layer, "text", place):
                        yield read, row, *self._seen(layer, row, self._text_slots(row), carried, group)
        for item in self.lm.items if self.lm.plan.cross_reads else ():
            for memory in self._of(item) if item.count else ():
                for read in memory.reads:
                    if (read.layer, read.kind, read.place) == (layer, "visual", place):
                        where: dict[str, Any] = {"ids": item.ids, "layout": item.layout}
                        yield read, item.row, *self._seen(layer, item.row, item.slots, carried, [memory], **where)

    def _seen(
        self, layer: int, row: int, slots: Any, carried: Tensor, memories: list[Memory], **where: Any
    ) -> tuple[Any, Rows]:
        """The slots where `carried` is, and what is seen of them where the memory is."""
        slots = slots.to(carried.device) if isinstance(slots, Tensor) else slots
        here = next(iter(memories[0].fields.values())).device
        queries = self.queries.get(layer)
        queries = None if queries is None else queries[row][:, slots].to(here)
        fields = tuple(memory.fields for memory in memories)
        return slots, Rows(carried[row, slots].to(here), fields, queries, module=memories[0].module, **where)

    def _text_slots(self, row: int) -> Any:
        """The slots of a sample's text; all where nothing else is there."""
        packing = self.lm.tokens.packing
        if self._text[0] is not packing:
            text = packing.mask.clone()
            for item in self.lm.items:
                text[item.row, item.slots] = text[item.row, item.separator_slots] = False
            whole = not self.lm.items and not packing.padded
            self._text = packing, [slice(None) if whole else own.nonzero()[:, 0] for own in text]
        return self._text[1][row]

    def leave(self, state: Any) -> None:
        """After the language model: later forwards read what this one did.

        Args:
            state: of the cache; None where there is none.
        """
        memories = self.memories()
        if state is not None:
            state.memories = memories
        if self.lm.items:
            self.lm.note({"beside_bytes": sum(memory.nbytes for own in memories for memory in own)})
