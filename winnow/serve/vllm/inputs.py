"""The inputs of vLLM's encoders by the names and shapes that winnow's adapters know, and parts of a batch of them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from winnow.serve.vllm.order import Order

PER_ITEM = {"image_sizes": 2, "image_grid_thw": 3}
COUNTS = ("num_patches", "image_num_patches")


def of_item(data: Mapping[str, Any]) -> dict[str, Any]:
    """The inputs of one picture, as vLLM's front end has them, with a leading axis where the library has one."""
    made = {name: data[name].reshape(1, width) for name, width in PER_ITEM.items() if name in data}
    if "pixel_values" in data:
        made["pixel_values"] = data["pixel_values"]
    return made


def of_call(kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """The inputs of one call of the encoder."""
    made = {name: value for name, value in kwargs.items() if name in (*PER_ITEM, "pixel_values")}
    pixels = made.get("pixel_values")
    if isinstance(pixels, list | tuple):
        made["pixel_values"] = torch.cat([x if x.ndim == 4 else x[None] for x in pixels])
    elif isinstance(pixels, Tensor) and pixels.ndim == 5:
        made["pixel_values"] = pixels.flatten(0, 1)
    if "pixel_attention_mask" in kwargs:  # in transformers, encoders with a mask take rows of tiles
        made["pixel_values"] = made["pixel_values"][None]
        made["pixel_attention_mask"] = kwargs["pixel_attention_mask"][None]
    return made


def batches(orders: Sequence[Order], most: int) -> Iterator[list[int]]:
    """Pictures that are encoded together: of one plan, and of at most `most` uncompressed tokens.

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
            if batch and total + size > most:
                yield batch
                batch, total = [], 0
            batch.append(number)
            total += size
        yield batch


def patch_counts(kwargs: Mapping[str, Any], items: int) -> list[int]:
    """How many rows of flat inputs (patches or tiles) belong to each picture; 1 where there are no flat inputs."""
    if "image_grid_thw" in kwargs:
        return torch.as_tensor(kwargs["image_grid_thw"]).prod(-1).tolist()
    for name in COUNTS:
        if name in kwargs:
            return torch.as_tensor(kwargs[name]).flatten().tolist()
    return [1] * items


def part_of(kwargs: Mapping[str, Any], numbers: Sequence[int], items: int) -> dict[str, Any]:
    """The inputs of some pictures of a call.

    Args:
        numbers: of the pictures.
        items: pictures of the call.
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
    return value  # shared by all pictures
