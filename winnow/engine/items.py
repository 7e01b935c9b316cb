"""Items of a forward: which placeholders of which row belong to which encoded picture."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from jaxtyping import Int
from torch import Tensor

from winnow.core.errors import UnsupportedError, WinnowError
from winnow.core.layout import CONTENT, Layout
from winnow.core.ledger import ItemLedger
from winnow.core.step import State
from winnow.models.family import Encoding


@dataclass(eq=False)
class Item:
    """One item while it passes through the LM.

    Attributes:
        slots: `[n]` physical slots of its content tokens in its row.
        ids: `[n]` their content ids (a merged token: its anchor).
        separators: `[s]` physical slots of its separators.
        start: where its first placeholder stands in its row.
        number: its place in the encoding.
        entered: content tokens with which it entered `layers[0]`, once it has.
        states: what each method of the plan remembers of it.
    """

    row: int
    start: int
    number: int
    encoding: Encoding
    slots: Int[Tensor, " n"]
    ids: Int[Tensor, " n"]
    separators: Int[Tensor, " s"]
    record: ItemLedger
    entered: int | None = None
    states: dict[int, State] = field(default_factory=dict)

    @property
    def layout(self) -> Layout:
        return self.record.layout

    @property
    def count(self) -> int:
        return self.slots.shape[0]


def find_items(
    ids: Int[Tensor, "b s"], placeholder: int, encoding: Encoding, device: torch.device
) -> tuple[list[Item], list[int]]:
    """The items of one modality in a batch of token ids (on the CPU), and where the last one ends in each row.

    `generate` may have repeated each row k times (beams, several returned sequences); the encoded items then belong
    to the unrepeated rows.
    """
    rows, total = ids.shape[0], int((ids == placeholder).sum())
    encoded = sum(encoding.lengths)
    repeats, rest = divmod(total, encoded) if encoded else (1, total)
    if rest or repeats == 0 or rows % repeats:
        raise UnsupportedError(
            f"the prompt holds {total} {encoding.modality} placeholders for {encoded} encoded tokens. "
            "Either the prompt and the pictures do not match, or the prompt is prefilled in chunks, "
            "which compression does not support."
        )
    items: list[Item] = []
    ends = [0] * rows
    number = 0
    for original in range(rows // repeats):
        first = number
        for row in range(original * repeats, (original + 1) * repeats):
            number, at = first, 0
            where = (ids[row] == placeholder).nonzero()[:, 0]
            while at < len(where):
                length = encoding.lengths[number]
                if at + length > len(where):
                    raise WinnowError(
                        f"row {row} ends inside {encoding.modality} {number}: "
                        f"{len(where) - at} of {length} placeholders."
                    )
                items.append(_item(row, number, encoding, where[at : at + length], device))
                number, at = number + 1, at + length
            ends[row] = int(where[-1]) + 1 if len(where) else 0
    return items, ends


def _item(row: int, number: int, encoding: Encoding, where: Tensor, device: torch.device) -> Item:
    layout = encoding.layouts[number]
    content = torch.from_numpy(layout.kind == CONTENT)
    entry = layout.n_content
    return Item(
        row,
        int(where[0]),
        number,
        encoding,
        slots=where[content].to(device),
        ids=torch.arange(entry, device=device),
        separators=where[~content].to(device),
        record=ItemLedger(row, encoding.modality, layout, entry),
    )
