"""Groups: which samples (and, for a ragged cache, which heads) of a layer a step sees together, padding left out."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from winnow.cache.blocks import Coded
from winnow.cache.ragged import Ragged
from winnow.core.kv_budget import KINDS


@dataclass(frozen=True, eq=False)
class Group:
    """Samples that hold equally many slots.

    Attributes:
        rows: of the batch, on the host.
        heads: of these rows, where heads hold unequal numbers; None: all.
        index: `[b, n]` the columns of the store that are real; None: all.
    """

    rows: tuple[int, ...]
    heads: tuple[int, ...] | None = None
    index: Tensor | None = None

    @property
    def key(self) -> Any:
        """Tells it from other groups of the layer."""
        return (self.rows, self.heads)


def groups_of(store: Any, kinds: Tensor | None, seen: int) -> list[Group]:
    """The groups of a layer.

    Args:
        kinds: `[B, seen]` of all tokens that were read, where a plan asks: samples are then of one group only if they
            hold as many of each kind.
    """
    if isinstance(store, Ragged):
        return _of_heads(store)
    rows, real = store.rows_held, store.real
    if real is None and (kinds is None or rows == 1):
        return [Group(tuple(range(rows)))]
    counts = real.sum(1).tolist() if real is not None else [store.length] * rows
    told = [None] * rows if kinds is None else _kind_counts(store, kinds, seen)
    by: dict[Any, list[int]] = {}
    for row in range(rows):
        by.setdefault((counts[row], told[row]), []).append(row)
    return [Group(tuple(own), None, _real_columns(real, own, n)) for (n, _), own in by.items() if n]


def _of_heads(store: Ragged) -> list[Group]:
    found = []
    for row in range(len(store.lengths) // store.heads):
        lengths = store.lengths[row * store.heads : (row + 1) * store.heads]
        for n in sorted(set(lengths), reverse=True):
            found.append(Group((row,), tuple(head for head, own in enumerate(lengths) if own == n)))
    return found


def _kind_counts(store: Any, kinds: Tensor, seen: int) -> list[Any]:
    held = kinds.gather(1, slots_of(store, seen)[:, 0].long().to(kinds.device)).cpu().long()
    real = torch.ones_like(held, dtype=torch.bool) if store.real is None else store.real.cpu()
    return [tuple(row[own].bincount(minlength=len(KINDS)).tolist()) for row, own in zip(held, real, strict=True)]


def _real_columns(real: Tensor | None, rows: list[int], n: int) -> Tensor | None:
    if real is None or n == real.shape[1]:
        return None
    own = real[torch.tensor(rows, device=real.device)]
    return torch.argsort((~own).to(torch.uint8), dim=1, stable=True)[:, :n]


def slots_of(store: Any, seen: int) -> Tensor:
    """`[B, G, L]` int32 how many tokens were read before each slot of a store that is not ragged."""
    if isinstance(store, Coded):
        return store.slots_at(seen)
    keys = store.read()[0]
    b, g, n = keys.shape[:3]
    known = 0 if store.slots is None else store.slots.shape[2]
    later = torch.arange(seen - (n - known), seen, device=keys.device, dtype=torch.int32).expand(b, g, -1)
    return torch.cat([store.slots.expand(b, g, -1), later], 2) if known else later


def parts_of(store: Any, group: Group, seen: int) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """Keys and values `[b, G, n, d]`, slots and bias `[b, G, n]` of a group."""
    if isinstance(store, Ragged):
        lanes = [store.lane(group.rows[0] * store.heads + head) for head in group.heads or ()]
        found = [None if lanes[0][i] is None else torch.stack([lane[i] for lane in lanes])[None] for i in range(4)]
        return tuple(found)  # type: ignore[return-value]
    found = [*store.read(), slots_of(store, seen), store.bias]
    return tuple(None if x is None else of_group(x, group) for x in found)  # type: ignore[return-value]


def of_group(x: Tensor, group: Group) -> Tensor:
    """`[b, G, n, …]` of `[B, G, L, …]`."""
    if len(group.rows) != x.shape[0]:
        x = x[torch.tensor(group.rows, device=x.device)]
    return x if group.index is None else at_slots(x, group.index.to(x.device)[:, None].expand(-1, x.shape[1], -1))


def at_slots(x: Tensor, at: Tensor) -> Tensor:
    """`[b, G, m, …]` of `[b, G, n, …]` at the places `[b, G, m]`."""
    extra = x.shape[3:]
    return x.gather(2, at.reshape(*at.shape, *(1,) * len(extra)).expand(*at.shape, *extra))
