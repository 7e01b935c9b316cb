"""The cache of a stream of frames: which slots stay between its first and its newest frames, and when they now are.

All tokens of a frame have one time. Slots are `[b, G, n]` in reading order, frame by frame; what is kept of several
frames stands as if it were whole frames again.
"""

import torch
from jaxtyping import Float, Int
from torch import Tensor

from winnow.core.kv_select import top_slots
from winnow.core.select import comparable


def participation(queries: Float[Tensor, "b h q d"], keys: Float[Tensor, "b g n d"]) -> Float[Tensor, "b g n"]:
    """The dot products of each key with all queries of a head, summed; the mean over the heads that share the key."""
    b, g = keys.shape[:2]
    summed = queries.float().sum(2).reshape(b, g, -1, queries.shape[3]).mean(2)
    return (keys.float() @ summed[..., None])[..., 0]


def between(scores: Float[Tensor, "b g n"], first: int, top: int, last: int) -> Int[Tensor, "b g m"]:
    """The first and the last slots, and of those between them the `top` with the highest scores, in reading order."""
    n = scores.shape[2]
    ends = torch.ones(n, dtype=torch.bool, device=scores.device)
    ends[first : max(first, n - last)] = False
    known = comparable(scores.flatten(0, 1)).view_as(scores)
    return top_slots(known.masked_fill(ends, torch.inf), min(n, first + top + last))


def closing(slots: Int[Tensor, "b g n"], frame: int = 1) -> Int[Tensor, "b g n"]:
    """By how many frames each slot moves so that all follow one another without a gap, and the last one stays.

    Args:
        slots: how many tokens were read before each one.
        frame: tokens of a frame.
    """
    n = slots.shape[2]
    behind = torch.div(n - 1 - torch.arange(n, device=slots.device), frame, rounding_mode="floor")
    times = torch.div(slots, frame, rounding_mode="floor")
    return times[..., -1:] - behind - times


def unmoved(
    stored: Float[Tensor, "b g n d"], keys: Float[Tensor, "b g n d"], shift: Int[Tensor, "b g n"]
) -> Float[Tensor, "b g n d"]:
    """Keys as they were first.

    Args:
        keys: as they were before they were moved; anything where they were not.
        shift: by how much they were moved.
    """
    return torch.where((shift == 0)[..., None], stored, keys)
