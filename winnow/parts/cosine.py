"""Cosine similarity, item by item: a batched product need not give the bits that its items give alone."""

from collections.abc import Callable

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.nn.functional import normalize

TABLE_LIMIT = 8192  # above this many tokens no V × V table is built

Rows = Callable[[Int[Tensor, "b 1"]], Float[Tensor, "b n"]]
"""Similarity of every token to one token of each item. The result may be a buffer that the next call overwrites."""


def unit(tokens: Float[Tensor, "b n d"]) -> tuple[list[Float[Tensor, "n d"]], Bool[Tensor, "b n"]]:
    """Tokens of each item at length 1, at least fp32, and which of them are broken (NaN or infinite; set to 0)."""
    wide = tokens.to(torch.promote_types(tokens.dtype, torch.float32))
    broken = ~wide.sum(-1).isfinite()
    of_length_one = [normalize(x, dim=-1).masked_fill_(bad[:, None], 0) for x, bad in zip(wide, broken, strict=True)]
    return of_length_one, broken


def product(a: list[Float[Tensor, "m d"]], b: list[Float[Tensor, "n d"]]) -> Float[Tensor, "b m n"]:
    """a · bᵀ of each item."""
    out = a[0].new_empty(len(a), a[0].shape[0], b[0].shape[0])
    for i, (x, y) in enumerate(zip(a, b, strict=True)):
        torch.mm(x, y.T, out=out[i])
    return out


def table(x: list[Float[Tensor, "n d"]]) -> Float[Tensor, "b n n"]:
    """x · xᵀ of each item, exactly symmetric: what lies below the diagonal is copied, which saves a third."""
    n, parts = x[0].shape[0], 6 if x[0].device.type == "cpu" else 1
    out, size = x[0].new_empty(len(x), n, n), max(1, -(-n // parts))
    for own, item in zip(out, x, strict=True):
        for start in range(0, n, size):
            rows = item[start : start + size] @ item[start:].T
            square = rows[:, : rows.shape[0]]
            rows[:, : rows.shape[0]] = torch.maximum(square, square.T)  # products round unequally
            own[start : start + size, start:] = rows
            own[start : start + size, :start] = own[:start, start : start + size].T
    return out


class TableRows:
    """Rows read from a table."""

    def __init__(self, alike: Float[Tensor, "b n n"]) -> None:
        lanes, n, _ = alike.shape
        self.alike, self._flat = alike, alike.reshape(lanes * n, n)
        self._start = torch.arange(lanes, device=alike.device)[:, None] * n
        self._buffer = alike.new_empty(lanes, n)

    def __call__(self, at: Int[Tensor, "b 1"]) -> Float[Tensor, "b n"]:
        return torch.index_select(self._flat, 0, (at + self._start)[:, 0], out=self._buffer)


def product_rows(x: list[Float[Tensor, "n d"]]) -> Rows:
    """Rows computed when they are asked for: one matrix-vector product for each item."""
    buffers = [item.new_empty(item.shape[0]) for item in x]

    def rows(at: Int[Tensor, "b 1"]) -> Float[Tensor, "b n"]:
        for i, item in enumerate(x):
            torch.mv(item, item.index_select(0, at[i])[0], out=buffers[i])
        return buffers[0][None] if len(buffers) == 1 else torch.stack(buffers)

    return rows


def cosine_rows(x: list[Float[Tensor, "n d"]]) -> Rows:
    """Rows from a table where that is no larger than the tokens (N ≤ D), else computed: memory stays O(N · D)."""
    n, d = x[0].shape
    return TableRows(table(x)) if n <= min(d, TABLE_LIMIT) else product_rows(x)


def neighbours(x: list[Float[Tensor, "n d"]], block: int = 1024) -> tuple[Rows, Float[Tensor, "b n"]]:
    """Rows, and the similarity of each token to its most similar other token (−1 where there is no other).

    Up to 8,192 tokens both come from one V × V table for each item (in which a token is at −1 to itself); above, rows
    are computed when they are asked for, and the neighbours in blocks.
    """
    n = x[0].shape[0]
    if n <= TABLE_LIMIT:
        # Two tokens that are each other's nearest tie exactly, because the table is exactly symmetric.
        alike = table(x)
        alike.diagonal(dim1=1, dim2=2).fill_(-1)
        return TableRows(alike), alike.amax(2)
    closest = x[0].new_full((len(x), n), -1)
    for own, item in zip(closest, x, strict=True):
        for start in range(0, n, block):
            rows = item[start : start + block] @ item.T
            rows.diagonal(start).fill_(-1)
            part = own[start : start + block]
            torch.maximum(part, rows.amax(1), out=part)
            torch.maximum(own, rows.amax(0), out=own)
    return product_rows(x), closest
