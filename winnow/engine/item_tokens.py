"""ItemTokens: the tokens of one item (a picture, a video) on their way through the tower or the language model."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from winnow.core.errors import UnsupportedError, WinnowError
from winnow.core.layout import CONTENT, Layout
from winnow.core.ledger import ItemLedger
from winnow.core.reduction import Reduction
from winnow.core.signal import Signal
from winnow.core.step import State


@dataclass(eq=False)
class ItemTokens:
    """What the step runner must know of an item.

    Attributes:
        row: its sample in the batch.
        number: its place in the encoder call.
        layout: of its tokens at this side: the tower's, or as they stand in the LM's sequence.
        ids: `[n]` which token of the layout each one is; a merged one: its representative.
        n_visual: content tokens in the LM's sequence, the denominator of budgets.
        record: its ledger.
        n_lm: content tokens with which it entered the LM, once it has.
        states: number of a method → what it remembers of the item.
        signals: what was read for it, in the coordinates of the tokens of now.
    """

    row: int
    number: int
    layout: Layout
    ids: Int[Tensor, " n"]
    n_visual: int
    record: ItemLedger
    n_lm: int = 0
    states: dict[int, State] = field(default_factory=dict)
    signals: dict[Signal, Tensor] = field(default_factory=dict)

    @property
    def count(self) -> int:
        return self.ids.shape[0]

    def follow(self, reduction: Reduction) -> None:
        """Ids, states and signals after a reduction of this item, whoever asked for it."""
        self.ids = self.ids[reduction.representatives]
        self.states = {number: carried(state, reduction) for number, state in self.states.items()}
        self.signals = {signal: signal.carry(value, reduction) for signal, value in self.signals.items()}


@dataclass(eq=False)
class TowerTokens(ItemTokens):
    """An item at `features`.

    Attributes:
        rows: `[n, C]` its tokens before the projector, `[n, D]` behind it.
        tiles: its place among the tiles that the tower saw.
        in_place: whether they are tokens of the tower in their own order.
        separators: whether its newlines stay.
        reduced: whether any step changed something.
        anchored: whether no two of them stand for one place; else they take the item's first places.
    """

    rows: Tensor = field(default_factory=lambda: torch.empty(0))
    tiles: slice = field(default_factory=lambda: slice(0))
    in_place: bool = True
    separators: bool = True
    reduced: bool = False
    anchored: bool = True

    def follow(self, reduction: Reduction) -> None:
        """At the tower's side signals are those of all tokens that it gave, and are read anew for each step."""
        self.signals = {}
        super().follow(reduction)


@dataclass(eq=False)
class LMTokens(ItemTokens):
    """An item in the LM's sequence.

    Attributes:
        encoded: the record of its encoder call.
        start: where its first placeholder stands in its row.
        slots: `[n]` slots of its content tokens.
        separator_slots: `[s]` slots of its separators.
    """

    encoded: Any = None
    start: int = 0
    slots: Int[Tensor, " n"] = field(default_factory=lambda: torch.empty(0, dtype=torch.int64))
    separator_slots: Int[Tensor, " s"] = field(default_factory=lambda: torch.empty(0, dtype=torch.int64))

    def leave(self, reduction: Reduction, separators: bool, kept: Bool[Tensor, "b s"]) -> int:
        """Move to the slots of the representatives, or to the first ones, and drop the others from `kept`.

        Returns how many slots were dropped.
        """
        was = self.slots
        unique = reduction.is_selection or reduction.representative is not None
        self.slots = was[reduction.representatives].sort().values if unique else was[: reduction.m]
        kept[self.row, was] = False
        kept[self.row, self.slots] = True
        return was.shape[0] - reduction.m + (0 if separators else self.drop_separators(kept))

    def drop_separators(self, kept: Bool[Tensor, "b s"]) -> int:
        """Drop the separators from `kept`; how many they were."""
        count = self.separator_slots.shape[0]
        kept[self.row, self.separator_slots] = False
        self.separator_slots = self.separator_slots[:0]
        return count


@dataclass(frozen=True, eq=False)
class Merged:
    """Rows that were made anew.

    Attributes:
        row: the sample.
        was, at: `[n]`, `[m]` the logical positions of the rows before, and of those that took their place.
        reduction: from the ones to the others.
    """

    row: int
    was: Int[Tensor, " n"]
    at: Int[Tensor, " m"]
    reduction: Reduction


def content_slots(items: Sequence[LMTokens], rows: int, device: torch.device) -> list[Int[Tensor, " _"]]:
    """The slots of all items of each row that have tokens left."""
    found = []
    for row in range(rows):
        own = [item.slots for item in items if item.row == row and item.count]
        found.append(torch.cat(own).to(device) if own else torch.zeros(0, dtype=torch.int64, device=device))
    return found


def rows_of(items: Sequence[LMTokens], hidden: Float[Tensor, "b s d"]) -> Float[Tensor, "g n d"]:
    """The rows of items of equal length, on the device of their slots."""
    at = torch.tensor([item.row for item in items], device=hidden.device)
    slots = torch.stack([item.slots for item in items])
    return hidden[at[:, None], slots.to(hidden.device)].to(slots.device)


def on_device(state: State, device: torch.device) -> State:
    """What a method remembers, where the tokens are from now on; what belongs to the request stays where it is."""

    def moved(fields: dict[str, Tensor]) -> dict[str, Tensor]:
        return {name: x.to(device) for name, x in fields.items()}

    return State(moved(state.token), moved(state.item), state.request, moved(state.summed))


def carried(state: State, reduction: Reduction) -> State:
    """What a method remembers of one item after a reduction, its own or another's.

    Per-token fields go with the representatives; summed fields add up over the sources that feed an output.
    """

    def take(x: Tensor) -> Tensor:
        return x[:, reduction.representatives]

    def add(x: Tensor) -> Tensor:
        feeds = (reduction.to_matrix() != 0).to(x.dtype)
        return (feeds @ x.flatten(2) if x.ndim > 2 else x @ feeds.T).reshape(x.shape[0], reduction.m, *x.shape[2:])

    return State(
        {k: take(v) for k, v in state.token.items()},
        state.item,
        state.request,
        {k: add(v) for k, v in state.summed.items()},
    )


@dataclass(frozen=True)
class Span:
    """Where an item's placeholders stand.

    Attributes:
        row: sample in the batch.
        number: of the item in its encoder call.
        where: `[n]` logical positions, on the host.
    """

    row: int
    number: int
    where: Int[Tensor, " n"]


def find_spans(
    ids: Int[Tensor, "b s"], placeholder: int, lengths: Sequence[int], modality: str
) -> tuple[list[Span], list[int]]:
    """The items of one modality in a batch of token ids (on the CPU), and where the last one ends in each row.

    `generate` may have repeated each row k times (beams, several returned sequences); the encoded items then belong
    to the unrepeated rows.

    Args:
        lengths: encoded tokens of each item.
    """
    rows, total, encoded = ids.shape[0], int((ids == placeholder).sum()), sum(lengths)
    repeats, rest = divmod(total, encoded) if encoded else (1, total)
    if rest or repeats == 0 or rows % repeats:
        raise UnsupportedError(
            f"the prompt holds {total} {modality} placeholders for {encoded} encoded tokens. "
            "Either the prompt and the pictures do not match, or the prompt is prefilled in chunks, "
            "which compression does not support."
        )
    spans: list[Span] = []
    ends = [0] * rows
    number = 0
    for original in range(rows // repeats):
        first = number
        for row in range(original * repeats, (original + 1) * repeats):
            number, at = first, 0
            where = (ids[row] == placeholder).nonzero()[:, 0]
            while at < len(where):
                length = lengths[number]
                if at + length > len(where):
                    raise WinnowError(
                        f"row {row} ends inside {modality} {number}: {len(where) - at} of {length} placeholders."
                    )
                spans.append(Span(row, number, where[at : at + length]))
                number, at = number + 1, at + length
            ends[row] = int(where[-1]) + 1 if len(where) else 0
    return spans, ends


def join_runs(spans: Sequence[Span]) -> tuple[list[Span], tuple[int, ...]]:
    """Spans of one unbroken run of placeholders as one, numbered anew, and how many spans became each item.

    Args:
        spans: as `find_spans` gives them; rows that `generate` has repeated have the same runs.
    """
    runs: list[list[Span]] = []
    for span in spans:
        before = runs[-1][-1] if runs else None
        if before is not None and before.row == span.row and int(span.where[0]) == int(before.where[-1]) + 1:
            runs[-1].append(span)
        else:
            runs.append([span])
    parts = {run[0].number: len(run) for run in runs}
    numbers = {first: number for number, first in enumerate(sorted(parts))}
    joined = [Span(run[0].row, numbers[run[0].number], torch.cat([span.where for span in run])) for run in runs]
    return joined, tuple(parts[first] for first in numbers)


def content_mask(layout: Layout) -> Tensor:
    """`[n]` which tokens of a layout are content."""
    return torch.from_numpy(layout.kind == CONTENT)
