"""What plans that act in the tower make of pictures, each picture once for all questions about it.

Questions about one picture differ in length, so they are in several batches. The tower reads no question: what a plan
makes of a picture there is the same for each of them.
"""

from __future__ import annotations

import dataclasses
import math
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from winnow.bench.requests import Batches, Request, Window
from winnow.bench.reuse import encode, taken_by
from winnow.bench.shared_layers import SharedLayers
from winnow.core.errors import WinnowError
from winnow.core.memory import out_of_memory
from winnow.core.plan import Plan
from winnow.core.signal import Signal
from winnow.engine.bound_plan import BoundPlan
from winnow.engine.encoder import cells_of
from winnow.engine.encoding import EncoderRecord, Reading, mark, record_of, unmarked
from winnow.engine.handle import Handle

BYTES = 2**31  # that the encodings of a window may take
UNREAD = ("last_hidden_state", "hidden_states", "attentions")  # by the language model, of an encoder's output


class SharedPictures:
    """The encodings of a window of pictures under plans that act in the tower.

    Args:
        reader: the plan that records what any of the plans needs from the tower.
        layers: what plans share of the tower.
    """

    def __init__(self, handle: Handle, reader: Plan, layers: SharedLayers) -> None:
        self.handle, self.reader, self.layers = handle, reader, layers
        self._kept: dict[tuple[Plan, str], Kept] = {}
        family = handle.bound.family
        whole = family.generic or family.joined or family.frames_apart or family.cross  # no item for each picture
        self._methods = [] if whole else [name for name, modality, _ in family.encoders if modality == "image"]

    def windows(self, asked: Batches, plans: Iterable[Plan], content: int, shards: int = 1) -> tuple[Window, ...]:
        """Windows of pictures for whose encodings there is room; as many windows for each of `shards`.

        Args:
            content: content tokens of a picture.
        """
        model = self.handle.model
        each = content * model.config.get_text_config().hidden_size * model.dtype.itemsize
        room = max(BYTES // max(each * len(self._sharing(plans)), 1), 1)
        return asked.windows(shards * math.ceil(len(asked.pictures) / (room * shards)))

    def encode(self, plans: Iterable[Plan], requests: Sequence[Request], rows: int) -> None:
        """Encode the pictures of a window under each of the plans, and forget those of the window before.

        Args:
            requests: one for each picture.
            rows: pictures in a call; of the last one too, whose sums are then rounded as those of the others.
        """
        self._kept.clear()
        sharing = self._sharing(plans)
        if not sharing or not self._given(requests[:1]):  # clips are encoded by another method
            return
        alike: dict[Any, list[Request]] = defaultdict(list)
        for request in requests:
            given = self._given([request])
            alike[tuple((name, tuple(x.shape)) for name, x in given.items())].append(request)
        for own in alike.values():
            for at in range(0, len(own), rows):
                self._encode(sharing, [own[(at + i) % len(own)] for i in range(rows)])
        self.layers.forget()

    def under(self, plan: Plan, requests: Sequence[Request]) -> Any:
        """The encoder's output for a batch inside `using(plan)`; None where it has to be encoded."""
        found = [self._kept.get((plan, request.ask.image)) for request in requests]
        kept = [one for one in found if one is not None]
        return _joined(kept, self._given(requests)) if len(kept) == len(found) else None

    def _sharing(self, plans: Iterable[Plan]) -> list[Plan]:
        return [plan for plan in dict.fromkeys(plans) if self._methods and _is_shared(self.handle.bind(plan))]

    @property
    def _method(self) -> Any:
        return getattr(self.handle.bound.base, self._methods[0])

    def _given(self, requests: Sequence[Request]) -> dict[str, Tensor]:
        own = [taken_by(self._method, request.inputs) for request in requests]
        return {name: torch.cat([given[name] for given in own]) for name in own[0]}

    def _encode(self, plans: Sequence[Plan], requests: Sequence[Request]) -> None:
        given = self._given(requests)
        self.layers.forget()
        for plan in (self.reader, *plans):
            try:
                with self.handle.using(plan), self.layers.under(self.handle.bind(plan)):
                    output = encode(self._method, given)
            except Exception as error:
                if isinstance(error, WinnowError) or out_of_memory(error):
                    continue  # each of its batches is encoded for itself, and answers with the error
                raise
            if plan is not self.reader and _has_item_each(output, len(requests)):
                for request, kept in zip(requests, self._taken_apart(output), strict=True):
                    self._kept.setdefault((plan, request.ask.image), kept)

    def _taken_apart(self, output: Any) -> list[Kept]:
        bound, record = self.handle.bound, _record(output)
        starts = (*bound.family.cell_starts(bound.model, record), None)
        cells = {signal: cells_of(bound, record, signal) for signal in _read_behind(record.plan)}  # type: ignore[arg-type]
        output = _without_rows(output)
        found = []
        for place, (start, end) in enumerate(pairwise(starts)):
            own = {signal: values[start:end] for signal, values in cells.items()}
            found.append(Kept(output, place, own))
        return found


@dataclass(frozen=True, eq=False)
class Kept:
    """What a plan made of one picture.

    Attributes:
        output: of the call in which it was encoded, without what nobody reads.
        place: of the picture in that call.
        cells: what steps behind the tower read of it.
    """

    output: Any
    place: int
    cells: dict[Signal, Tensor]


def _record(output: Any) -> EncoderRecord:
    return record_of(output)  # type: ignore[return-value]


def _is_shared(bound: BoundPlan) -> bool:
    """Whether a plan acts in the tower, and remembers nothing of requests."""
    return bound.acts_in_tower and not any(method.streaming for method in bound.plan.methods)


def _read_behind(bound: BoundPlan) -> set[Signal]:
    """What steps behind the tower read of it."""
    behind = (bound.projected, *bound.layers.values(), *bound.kv.values())
    return {signal for steps in behind for _, step in steps for signal in step.needs} & set(bound.tower_signals)


def _has_item_each(output: Any, pictures: int) -> bool:
    """Whether the output can be taken apart into pictures: nothing is in it that belongs to all of them."""
    record = _record(output)
    others = {f.name for f in dataclasses.fields(output) if getattr(output, f.name) is not None}
    counts = {len(output.pooler_output), len(record.layouts), len(record.items), len(record.lengths), pictures}
    return len(counts) == 1 and others <= {"pooler_output", "winnow", *UNREAD}


def _without_rows(output: Any) -> Any:
    """An output with what the language model reads of it, and the items without their rows, which stand in it."""
    record, plain = _record(output), unmarked(output)
    items = [dataclasses.replace(item, rows=item.rows[:0], signals={}) for item in record.items]
    unread = {f.name: None for f in dataclasses.fields(plain) if f.name in UNREAD}
    few = dataclasses.replace(record, inputs={}, readings={}, items=items, times={}, notes={})
    return mark(dataclasses.replace(plain, **unread), few)


def _joined(kept: Sequence[Kept], given: dict[str, Tensor]) -> Any:
    """The output for a batch of pictures.

    Args:
        given: what the encoder would have been given.
    """
    records = [(_record(one.output), one.place) for one in kept]
    rows = [one.output.pooler_output[one.place] for one in kept]
    first = kept[0].output.pooler_output
    record = dataclasses.replace(
        records[0][0],
        inputs=given,
        undivided=len(rows) == 1 and isinstance(first, Tensor),
        lengths=tuple(record.lengths[place] for record, place in records),
        layouts=tuple(record.layouts[place] for record, place in records),
        items=[dataclasses.replace(r.items[place], number=n) for n, (r, place) in enumerate(records)],
        readings={s: Reading(joined=torch.cat([one.cells[s] for one in kept])) for s in kept[0].cells},
    )
    pooled = torch.stack(rows) if isinstance(first, Tensor) else type(first)(rows)
    return mark(dataclasses.replace(unmarked(kept[0].output), pooler_output=pooled), record)
