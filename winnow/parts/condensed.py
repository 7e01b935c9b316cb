"""A frame as so many tokens: means over parts of its grid that are as square as the number allows."""

from collections.abc import Sequence

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from winnow.core.reduction import Reduction


def parts_of(
    count: Int[Tensor, "*lanes 1"], places: Int[Tensor, "p 2"], sides: tuple[int, int]
) -> Int[Tensor, "*lanes p"]:
    """The part of each place of a grid that is cut into bands of rows, and each band into runs of columns.

    There are exactly `count` parts, none of them empty: of a square of them, m × m.

    Args:
        count: parts; at most as many as places.
        places: row and column of each.
        sides: rows and columns of the grid.
    """
    (h, w), (row, col) = sides, places.unbind(1)
    least = torch.div(count + w - 1, w, rounding_mode="floor")
    bands = (count.double() * h / w).sqrt().round().long().clamp_max(h)
    bands = torch.minimum(torch.maximum(bands, least), count).clamp_min(1)
    band = torch.div(row * bands, h, rounding_mode="floor")
    each, more = torch.div(count, bands, rounding_mode="floor"), count % bands
    columns = each + (band < more)
    return band * each + torch.minimum(band, more) + torch.div(col * columns, w, rounding_mode="floor")


def means_of(part: Int[Tensor, "b n"], broken: Bool[Tensor, "b n"], m: int) -> Reduction:
    """Each part as the mean of its tokens, at the place of the first of them.

    Args:
        part: of each token, from 0 to m − 1; −1: it is dropped. None is empty.
        broken: tokens that do not count, where a part has others.
    """
    device, held = part.device, part.clamp_min(0)

    def counted(what: Bool[Tensor, "b n"]) -> Int[Tensor, "b m"]:
        return torch.zeros(len(part), m, dtype=torch.int64, device=device).scatter_add_(1, held, what.long())

    whole = (part >= 0) & ~broken
    sound = counted(whole)
    used = whole | ((part >= 0) & (sound == 0).gather(1, held))
    at = torch.arange(part.shape[1], device=device).expand_as(part)
    first = torch.full((len(part), m), part.shape[1], device=device)
    first, order = first.scatter_reduce(1, held, torch.where(used, at, part.shape[1]), "amin").sort(1)
    number = order.argsort(1).gather(1, held)
    weight = 1 / counted(used).gather(1, held).clamp_min(1).double()
    return Reduction.assign(torch.where(used, number, -1), weight.float(), m=m, representative=first)


def parts_naive(count: int, h: int, w: int) -> list[Sequence[tuple[int, int]]]:
    """The same: the places of each part."""
    bands = min(max(min(round((count * h / w) ** 0.5), h), -(-count // w)), count) or 1
    parts: list[list[tuple[int, int]]] = []
    for band in range(bands):
        rows = [r for r in range(h) if r * bands // h == band]
        columns = count // bands + (band < count % bands)
        parts += [[(r, c) for r in rows for c in range(w) if c * columns // w == i] for i in range(columns)]
    return parts  # type: ignore[return-value]
