"""The tokens of an item frame by frame: a token and the one at its place in another frame stand side by side.

A picture is one frame, whatever its tiles. Where an earlier method has removed tokens, a place of a frame is empty.
"""

from functools import lru_cache
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from winnow.core.errors import WinnowError
from winnow.core.layout import Layout
from winnow.core.view import View


class FrameGrid(NamedTuple):
    """Where the content tokens of a layout lie.

    Attributes:
        slot: `[v]` frame · places + place of each.
        frames: how many there are.
        places: the tokens of a frame; where frames differ, of all of them together.
    """

    slot: Int[Tensor, " v"]
    frames: int
    places: int

    @property
    def full(self) -> bool:
        """Whether each frame has a token at each place."""
        return len(self.slot) == self.frames * self.places


class Clip(NamedTuple):
    """The tokens of a view by frame and place.

    Attributes:
        tokens: `[b, t, p, D]`, in the dtype of the view; zeros where there is none.
        there: `[b, t, p]` whether there is one.
        slot: `[b, N]` frame · p + place of each token of the view.
    """

    tokens: Float[Tensor, "b t p d"]
    there: Bool[Tensor, "b t p"]
    slot: Int[Tensor, "b n"]

    def of_tokens(self, values: Tensor) -> Tensor:
        """`[b, t, p]` → `[b, N]`: the values of the tokens of the view, in their order."""
        return values.flatten(1).gather(1, self.slot)


@lru_cache(maxsize=128)
def frame_grid(layout: Layout, device: torch.device) -> FrameGrid:
    """The frames of a layout. Places are in the order of grid, row and column.

    Raises:
        WinnowError: two tokens of a video lie at one place of one frame.
    """
    place = layout.place[layout.content]
    times, frame = np.unique(place[:, 1], return_inverse=True)
    if len(times) <= 1:
        return FrameGrid(torch.arange(len(place), device=device), 1, len(place))
    spots, spot = np.unique(place[:, [0, 2, 3]], axis=0, return_inverse=True)
    slot = frame.reshape(-1) * len(spots) + spot.reshape(-1)
    if len(np.unique(slot)) < len(slot):
        raise WinnowError(
            f"Some of the {len(slot)} tokens of a video share a place of a frame, so frames cannot be compared place "
            "by place; the layout of its family must tell them apart by grid, row or column."
        )
    return FrameGrid(torch.from_numpy(slot).to(device), len(times), len(spots))


@lru_cache(maxsize=128)
def frame_sides(layout: Layout) -> tuple[int, int] | None:
    """Rows and columns of each frame, where its tokens fill one grid, so that places are in raster order; else None."""
    spots = np.unique(layout.place[layout.content][:, [0, 2, 3]], axis=0)
    h, w = (int(side) for side in np.ptp(spots[:, 1:], axis=0) + 1)
    return (h, w) if len(np.unique(spots[:, 0])) == 1 and len(spots) == h * w else None


def frame_of(view: View) -> Int[Tensor, "b n"]:
    """The frame of each token of the view, from 0."""
    grid = frame_grid(view.layout, view.ids.device)
    return torch.div(grid.slot, grid.places, rounding_mode="floor")[view.ids]


def clip_of(view: View) -> Clip:
    """The tokens of a view by frame and place. No host read."""
    grid = frame_grid(view.layout, view.ids.device)
    slot, size = grid.slot[view.ids], grid.frames * grid.places
    if view.n == size and grid.full:
        there = torch.ones(view.b, size, dtype=torch.bool, device=slot.device)
    else:
        there = torch.zeros(view.b, size, dtype=torch.bool, device=slot.device).scatter_(1, slot, True)
    width = view.tokens.shape[2]
    tokens = view.tokens.new_zeros(view.b, size, width).scatter_(1, slot[..., None].expand(-1, -1, width), view.tokens)
    shape = (grid.frames, grid.places)
    return Clip(tokens.unflatten(1, shape), there.unflatten(1, shape), slot)


def whole_clip(view: View, owner: str) -> Clip:
    """`clip_of`, for methods that need a token at each place of each frame.

    Args:
        owner: the slug of the method that asks.

    Raises:
        WinnowError: frames differ in their places, or an earlier method has removed tokens.
    """
    grid = frame_grid(view.layout, view.ids.device)
    if grid.full and view.n == len(grid.slot):
        return clip_of(view)
    why = "an earlier method has removed some" if grid.full else "its frames do not have the same places"
    raise WinnowError(
        f"{owner} needs a token at each of {grid.places} places of {grid.frames} frames, and the item has {view.n}: "
        f"{why}. Put {owner} before methods that remove tokens, or choose a method that does not compare places."
    )


def frame_slots(view: View, owner: str) -> tuple[int, Int[Tensor, "b n"]]:
    """How many frames a view has, and where each of its tokens stands, frame by frame and place by place.

    The places of a picture are not compared with others, so that some may be empty.

    Args:
        owner: the slug of the method that asks.

    Raises:
        WinnowError: of a video that `whole_clip` refuses.
    """
    frames = frame_grid(view.layout, view.ids.device).frames
    if frames > 1:
        return frames, whole_clip(view, owner).slot
    return 1, torch.arange(view.n, device=view.ids.device).expand(view.b, -1)
