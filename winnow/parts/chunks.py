"""The tokens of a video in chunks of a few frames, for parts that read one chunk at a time."""

from functools import lru_cache
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from winnow.core.layout import Layout
from winnow.core.select import count_broken
from winnow.core.view import View
from winnow.parts.frames import frame_slots


class Chunks(NamedTuple):
    """Chunks, filled up to the longest by their last token.

    Attributes:
        tokens: `[b, C, S, D]`, zeros for broken ones.
        place: `[b, C, S, 3]` frame of the chunk, row and column.
        there: `[b, C, S]` which of them there are, and not broken.
        at: `[b, C, S]` which tokens of the view they are.
        sizes: tokens of each chunk.
        frame: tokens of a frame.
    """

    tokens: Float[Tensor, "b c s d"]
    place: Int[Tensor, "b c s 3"]
    there: Bool[Tensor, "b c s"]
    at: Int[Tensor, "b c s"]
    sizes: list[int]
    frame: int


def chunks_of(view: View, every: int, owner: str) -> Chunks:
    """The chunks of a view, so many frames each, and what is left; a picture is one chunk. No host read.

    Args:
        owner: the slug of the method that asks.

    Raises:
        WinnowError: of a video whose frames are not whole.
    """
    frames, slot = frame_slots(view, owner)
    own, device = view.n // frames, slot.device
    sizes = [own * min(every, frames - first) for first in range(0, frames, every)]
    starts = torch.tensor([sum(sizes[:c]) for c in range(len(sizes))], device=device)[:, None]
    size, inside = torch.tensor(sizes, device=device)[:, None], torch.arange(max(sizes), device=device)
    at = slot.argsort(1)[:, starts + inside.minimum(size - 1)]
    sound = view.tokens.to(torch.promote_types(view.tokens.dtype, torch.float32)).sum(-1).isfinite()
    count_broken(~sound, view)
    place = place_of(view)
    place = torch.cat([(slot // own % every)[..., None], place[..., 1:]], -1)
    lane = torch.arange(view.b, device=device)[:, None, None]
    tokens = view.tokens.masked_fill(~sound[..., None], 0)[lane, at]
    return Chunks(tokens, place[lane, at], (inside < size) & sound[lane, at], at, sizes, own)


def place_of(view: View) -> Int[Tensor, "b n 3"]:
    """Frame, row and column of each token of a view."""
    return _places(view.layout, view.ids.device)[view.ids]


@lru_cache(maxsize=128)
def _places(layout: Layout, device: torch.device) -> Int[Tensor, "v 3"]:
    return torch.from_numpy(layout.place[layout.content, 1:]).to(device)
