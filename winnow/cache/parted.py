"""Rows of a prefill that attend in parts: each part to some slots, the last rows to what is left of the cache."""

from collections.abc import Iterator
from typing import Any

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from winnow.cache.groups import Group, of_group
from winnow.cache.masks import allowed
from winnow.cache.queries import Asked
from winnow.core.errors import UnsupportedError, WinnowError
from winnow.core.kv import KVView
from winnow.core.reduction import Reduction
from winnow.core.step import Parted

Portion = tuple[Tensor, Tensor, Tensor, Any]
"""Columns of the queries that attend, keys and values `[1, G, s, d]`, and a mask `[1, 1, r, s]`."""


def check_parted(action: Parted, view: KVView, slug: str) -> None:
    """Refuse parts in which a row is missing, or comes twice."""
    fresh = set(range(view.n - view.fresh, view.n))
    if len(action.parts) != view.b or len(action.last) not in (0, view.b):
        raise WinnowError(f"{slug}: Parted has parts for {len(action.parts)} samples of {view.b}.")
    for number, own in enumerate(action.parts):
        last = action.last[number] if action.last else 0
        rows = [row for part, _ in own for row in part.tolist()] + list(range(view.n - last, view.n))
        if sorted(rows) != sorted(fresh):
            raise WinnowError(f"{slug}: Parted takes each of {len(fresh)} rows once; got {len(rows)}.")


def portions_of(
    action: Parted, group: Group, lane: int, columns: Int[Tensor, " n"], pair: tuple[Tensor, Tensor], asked: Asked
) -> Iterator[Portion]:
    """What attends to what, for one sample of a group.

    Args:
        columns: of the store, that are the sample's slots.
        pair: keys and values `[B, G, L, d]` of the store.

    Raises:
        UnsupportedError: the attention takes no mask of its own for each part.
    """
    kind = getattr(asked.module.config, "_attn_implementation", "")
    if kind not in ("sdpa", "eager"):
        raise UnsupportedError(
            f"rows that attend in parts need an attention that takes any mask, and {kind} does not; load the model "
            'with attn_implementation="sdpa".'
        )
    row, (keys, values) = group.rows[lane], pair
    start = keys.shape[2] - asked.query.shape[2]
    seen = allowed(asked.mask)
    seen = None if seen is None else seen[row if seen.shape[0] > 1 else 0]

    def mask(rows: Tensor, slots: Tensor) -> Bool[Tensor, "r s"]:
        if seen is None:
            return columns[slots] <= columns[rows][:, None]
        return seen[columns[rows] - start][:, columns[slots]]

    for rows, slots in action.parts[lane]:
        at = columns[slots]
        yield columns[rows] - start, keys[row, None, :, at], values[row, None, :, at], _of(mask(rows, slots), asked)
    last = action.last[lane] if action.last else 0
    if last and action.left is not None:
        rows = torch.arange(len(columns) - last, len(columns), device=columns.device)
        keys, values = _left(action.left.k, keys, group, lane), _left(action.left.v, values, group, lane)
        before = torch.ones(last, keys.shape[2] - last, dtype=torch.bool, device=columns.device)
        yield columns[rows] - start, keys, values, _of(torch.cat([before, mask(rows, rows)], 1), asked)


def _left(chosen: Reduction, x: Tensor, group: Group, lane: int) -> Tensor:
    """`[1, G, m, d]` what a map leaves of a sample's keys or values."""
    wide = of_group(x, group)[lane].to(torch.promote_types(x.dtype, torch.float32))
    return chosen.lane(lane).apply(wide)[None].to(x.dtype)


def _of(seen: Tensor, asked: Asked) -> Tensor:
    """A mask as the attention function takes it: of booleans, or of what is added to logits."""
    own = seen[None, None]
    if asked.mask is None or asked.mask.dtype == torch.bool:
        return own
    low = torch.finfo(asked.query.dtype).min
    return torch.zeros(own.shape, dtype=asked.query.dtype, device=own.device).masked_fill(~own, low)
