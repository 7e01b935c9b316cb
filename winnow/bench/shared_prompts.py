"""Prompts of questions about one picture: what they begin with goes through a layer once.

A plan that reads no question leaves the same tokens of a picture to each question about it, so these prompts differ at
their ends alone. A causal layer makes of their common beginning what it makes of one of them; the ends then attend to
its keys and values. Nothing is assumed of plans: the tokens that a layer is given are compared, and a layer that takes
anything else, or another mask, runs as it is. Sums are rounded as in a batch of another size.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from transformers.cache_utils import DynamicCache

from winnow.engine.versions import CACHE_NAMES

WORTH = 0.85  # of a batch's tokens: where more are left to compute, the batch is computed as it is
TAKEN = {"attention_mask", "position_ids", *CACHE_NAMES, "use_cache", "position_embeddings"}  # by a layer


@dataclass(frozen=True, eq=False)
class Beginnings:
    """Of rows `[B, S]`, padded on the left: the columns before the first in which rows of a group differ.

    Attributes:
        width: how many columns that are.
        rows: `[G]` one of each group.
        group: `[B]` of each row.
        pads: `[B]` columns of padding.
    """

    width: int
    rows: Int[Tensor, " g"]
    group: Int[Tensor, " b"]
    pads: Int[Tensor, " b"]

    def of(self, x: Float[Tensor, "b s d"]) -> Float[Tensor, "g t d"]:
        """The beginnings, moved to the left of their padding."""
        columns = torch.arange(self.width, device=x.device) + self.pads[self.rows, None]
        return x[self.rows[:, None], columns]

    def spread(self, x: Float[Tensor, "g t d"]) -> Float[Tensor, "b t d"]:
        """Beginnings in the columns of all rows. What stands in columns of padding is of no account."""
        columns = torch.arange(self.width, device=x.device) - self.pads[:, None]
        return x[self.group[:, None], columns.clamp(min=0)]


class SharedPrompts:
    """Runs the layers of one request.

    Args:
        pictures: which each row asks about.
    """

    def __init__(self, pictures: Sequence[str]) -> None:
        numbers = {picture: n for n, picture in enumerate(dict.fromkeys(pictures))}
        self._group = torch.tensor([numbers[picture] for picture in pictures])
        self._known: tuple[Tensor, int, Beginnings] | None = None

    def run(self, layer: Callable[..., Any], index: int, args: Sequence[Any], kwargs: dict[str, Any]) -> Tensor | None:
        """The output of a layer, whose keys and values go into the cache; None where the layer has to run as it is.

        Args:
            index: of the layer in the cache, which holds nothing of it yet.
        """
        given = {name: x for name, x in kwargs.items() if x is not None}
        held = next((name for name in CACHE_NAMES if name in given), None)
        if len(args) != 1 or given.keys() - TAKEN or held is None or "position_embeddings" not in given:
            return None
        hidden, mask, cache = args[0], given.pop("attention_mask", None), given.pop(held)
        rotary, places = given.pop("position_embeddings"), given.pop("position_ids", None)
        b, s = hidden.shape[:2]
        if b != len(self._group) or any(x.ndim != 3 for x in rotary) or (places is not None and places.ndim != 2):
            return None
        rotary = tuple(x.expand(b, -1, -1) for x in rotary)
        begin = self._beginnings(hidden, rotary, mask)
        if begin is None:
            return None
        apart = DynamicCache()
        own: dict[str, Any] = {"position_embeddings": tuple(map(begin.of, rotary))}
        own |= {"attention_mask": None, held: apart}
        if places is not None:
            places = places.expand(b, -1)
            own["position_ids"] = begin.of(places[..., None])[..., 0]
        first = layer(begin.of(hidden), **given, **own)
        if not isinstance(first, Tensor):
            return None
        stored: Any = apart.layers[index]
        cut = begin.width
        cache.update(*(begin.spread(x.transpose(1, 2)).transpose(1, 2) for x in (stored.keys, stored.values)), index)
        sees = _causal(b, s, hidden.device) if mask is None else mask
        own = {"position_embeddings": tuple(x[:, cut:] for x in rotary), "attention_mask": sees[:, :, cut:]}
        own |= {"position_ids": None if places is None else places[:, cut:], held: cache}
        output = torch.cat([begin.spread(first), layer(hidden[:, cut:], **given, **own)], 1)
        if not output.is_inference():
            self._known = (output, output._version, begin)
        return output

    def _beginnings(self, hidden: Tensor, rotary: tuple[Tensor, ...], mask: Tensor | None) -> Beginnings | None:
        """What can be shared of the rows; None where it is too little."""
        if self._known is not None:
            output, version, begin = self._known
            if hidden is output and hidden._version == version:
                return begin  # rows that were equal are equal still
        return beginnings(hidden, rotary, mask, self._group.to(hidden.device))


def beginnings(
    hidden: Float[Tensor, "b s d"],
    rotary: Sequence[Float[Tensor, "b s e"]],
    mask: Bool[Tensor, "b 1 s s"] | None,
    group: Int[Tensor, " b"],
) -> Beginnings | None:
    """What rows of a group begin with alike; None where too little is left out by it, or the mask is not causal.

    Args:
        rotary: what tells positions.
        mask: which columns each row's tokens see; None: all before them.
        group: of each row; groups are numbered in the order of their first rows.
    """
    b, s = hidden.shape[:2]
    pads = hidden.new_zeros(b, dtype=torch.int64)
    if mask is not None:
        if mask.dtype != torch.bool or mask.shape != (b, 1, s, s):
            return None
        pads = mask[:, 0, -1].int().argmax(1)
        real = torch.arange(s, device=hidden.device) >= pads[:, None]
        wanted = _causal(b, s, hidden.device)[:, 0] & real[:, None]
        if not bool(((mask[:, 0] == wanted) | ~real[:, :, None]).all()):
            return None
    # The row of each group with the least padding reaches furthest into the columns of the others.
    order = torch.argsort(group * s + pads, stable=True)
    starts = torch.cat([order.new_ones(1), group[order].diff()]).bool()
    rows = order[starts]
    columns = torch.arange(s, device=hidden.device)[None] + pads[:, None]
    inside = columns < s
    columns = columns.clamp(max=s - 1)
    every = torch.arange(b, device=hidden.device)[:, None]
    same = inside
    for x in (hidden, *rotary):
        moved = x[every, columns]
        same = same & (moved == moved[rows[group]]).all(-1)
    alike = same.int().cumprod(1).sum(1) + pads  # columns of each row up to the first that differs
    alike[rows] = s
    width = int(torch.minimum(alike, s - pads[rows][group]).min().clamp(max=s - 1))
    left = len(rows) * width + b * (s - width)
    return Beginnings(width, rows, group, pads) if left <= WORTH * b * s else None


def _causal(b: int, s: int, device: torch.device) -> Bool[Tensor, "b 1 s s"]:
    return torch.ones(s, s, dtype=torch.bool, device=device).tril().expand(b, 1, s, s)
