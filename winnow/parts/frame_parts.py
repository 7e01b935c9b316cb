"""Means over parts of a frame, as square as their number allows, and where the places of a frame lie."""

import torch
from jaxtyping import Float, Int
from torch import Tensor

from winnow.core.layout import Layout
from winnow.core.view import View
from winnow.parts.condensed import parts_of
from winnow.parts.frames import frame_sides


def part_of_place(layout: Layout, places: int, count: int, device: torch.device) -> Int[Tensor, " p"]:
    """The part of each place of a frame, of so many or of as many as there are places.

    Where places fill no grid, because an earlier method has removed tokens of a picture, they stand in one row.
    """
    sides = frame_sides(layout)
    h, w = sides if sides is not None and sides[0] * sides[1] == places else (1, places)
    at = torch.arange(places, device=device)
    return parts_of(at.new_tensor([min(count, places)]), torch.stack([at // w, at % w], 1), (h, w))


def share_of_parts(layout: Layout, places: int, count: int, device: torch.device) -> Float[Tensor, "s p"]:
    """What each place of a frame counts in the means over its parts."""
    part = part_of_place(layout, places, count, device)
    own = (part == torch.arange(min(count, places), device=device)[:, None]).float()
    return own / own.sum(1, keepdim=True)


def rows_and_columns(view: View, order: Int[Tensor, "b n"], places: int) -> Float[Tensor, "b p 2"]:
    """The row and column of each place of the first frame.

    Args:
        order: the token of the view at each place of each frame.
    """
    place = view.layout.place[view.layout.content]
    return torch.stack([view.groups(place[:, axis]).gather(1, order[:, :places]) for axis in (2, 3)], 2).float()
