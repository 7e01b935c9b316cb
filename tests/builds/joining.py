"""How the tensors of the items of a batch come together where the items differ in kind or in size."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch.nn.functional import pad

from builds.build import Inputs, by_name


def padded(items: Sequence[Inputs]) -> Inputs:
    """As `by_name`; tensors are padded with 0 at their ends to the largest size of every dimension but the first."""
    largest: dict[str, list[int]] = {}
    for item in items:
        for name, tensor in item.items():
            seen = largest.get(name, tensor.shape[1:])
            largest[name] = [max(sizes) for sizes in zip(seen, tensor.shape[1:], strict=True)]
    return by_name([{name: _grown(tensor, largest[name]) for name, tensor in item.items()} for item in items])


def _grown(tensor: torch.Tensor, sizes: Sequence[int]) -> torch.Tensor:
    gaps = [size - own for size, own in zip(sizes, tensor.shape[1:], strict=True)]
    return pad(tensor, [side for gap in reversed(gaps) for side in (0, gap)])
