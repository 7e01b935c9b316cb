"""The inputs of vLLM's encoders by the names and shapes that winnow's adapters know, and parts of a batch of them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from winnow.serve.vllm.order import Order

MODALITIES = ("image", "video")
PIXELS = {"image": "pixel_values", "video": "pixel_values_videos"}
GRIDS = {"image": "image_grid_thw", "video": "video_grid_thw"}
PER_ITEM = {"image_sizes": 2, **dict.fromkeys(GRIDS.values(), 3)}
FRAMES = "video_num_patches"  # stands beside frames that are pictures to transformers
COUNTS = ("num_patches", "image_num_patches", FRAMES)


def of_item(data: Mapping[str, Any]) -> dict[str, Any]:
    """The inputs of one picture or video, as vLLM's front end has them, with a leading axis where the library has one.

    Frames that are given as pictures (`[frames, 3, H, W]`) have one; flat patches have none.
    """
    made = {name: data[name].reshape(1, width) for name, width in PER_ITEM.items() if name in data}
    made |= {name: data[name] for name in PIXELS.values() if name in data}
    return made | _frames(made, FRAMES in data)


def of_call(kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """The inputs of one call of the encoder; of one video at most."""
    made = {name: value for name, value in kwargs.items() if name in (*PER_ITEM, *PIXELS.values())}
    pixels = made.get("pixel_values")
    if isinstance(pixels, list | tuple):
        made["pixel_values"] = torch.cat([x if x.ndim == 4 else x[None] for x in pixels])
    elif isinstance(pixels, Tensor) and pixels.ndim == 5:
        made["pixel_values"] = pixels.flatten(0, 1)
    if "pixel_attention_mask" in kwargs:  # in transformers, encoders with a mask take rows of tiles
        made["pixel_values"] = made["pixel_values"][None]
        made["pixel_attention_mask"] = kwargs["pixel_attention_mask"][None]
    if isinstance(frames := made.get(PIXELS["video"]), list | tuple):
        (made[PIXELS["video"]],) = frames
    return made | _frames(made, FRAMES in kwargs)


def _frames(made: Mapping[str, Any], pictures: bool) -> dict[str, Tensor]:
    """The frames of a video as transformers is given them: a row of videos, or pictures."""
    frames = made.get(PIXELS["video"])
    if frames is None or frames.ndim != 4:
        return {}
    return {PIXELS["image"]: frames} if pictures else {PIXELS["video"]: frames[None]}


def batches(orders: Sequence[Order], most: int) -> Iterator[list[int]]:
    """Pictures that are encoded together: of one plan, and of at most `most` uncompressed tokens. Videos are alone.

    vLLM's scheduler counts the tokens that are left, so that without this the memory of the encoder would grow by the
    rate of compression.
    """
    by_plan: dict[str, list[int]] = {}
    for number, order in enumerate(orders):
        by_plan.setdefault(order.plan, []).append(number)
    for numbers in by_plan.values():
        batch: list[int] = []
        total = 0
        for number in numbers:
            size = sum(orders[number].runs)
            if batch and (total + size > most or orders[number].modality == "video"):
                yield batch
                batch, total = [], 0
            batch.append(number)
            total += size
        yield batch


def patch_counts(kwargs: Mapping[str, Any], items: int) -> list[int]:
    """How many rows of flat inputs (patches or tiles) belong to each item; 1 where there are no flat inputs."""
    for name in GRIDS.values():
        if name in kwargs:
            return torch.as_tensor(kwargs[name]).prod(-1).tolist()
    for name in COUNTS:
        if name in kwargs:
            return torch.as_tensor(kwargs[name]).flatten().tolist()
    return [1] * items


def part_of(kwargs: Mapping[str, Any], numbers: Sequence[int], items: int) -> dict[str, Any]:
    """The inputs of some items of a call.

    Args:
        numbers: of the pictures or videos.
        items: those of the call.
    """
    counts = patch_counts(kwargs, items)
    return {name: _part(value, numbers, counts) for name, value in kwargs.items()}


def _part(value: Any, numbers: Sequence[int], counts: Sequence[int]) -> Any:
    if isinstance(value, Tensor) and value.ndim and value.shape[0] == sum(counts) != len(counts):
        pieces = value.split(list(counts))
        return torch.cat([pieces[number] for number in numbers])
    if isinstance(value, Tensor) and value.ndim and value.shape[0] == len(counts):
        return value if list(numbers) == list(range(len(counts))) else value[list(numbers)]
    if isinstance(value, list | tuple) and len(value) == len(counts):
        return [value[number] for number in numbers]
    return value  # shared by all items
