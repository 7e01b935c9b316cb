"""Order: what the front end of vLLM asks the worker to do to one picture or video, as a tensor beside its pixels."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from winnow.core.plan import Plan

FIELD = "winnow_order"
_FULL = Plan(()).key


@dataclass(frozen=True)
class Order:
    """What is to be done to one picture or video.

    Attributes:
        plan: its key.
        runs: placeholders of each unbroken run that the item has in the prompt, uncompressed.
        kept: how many of each run stay; of a video, whose runs are one item, how many of all of them.
        modality: image or video.
        marks: token ids before each run and behind the last, where they are given to the language model beside the
            rows: how many of each frame stay is known behind the encoder alone. Empty: they are text of the prompt.
    """

    plan: str
    runs: tuple[int, ...]
    kept: tuple[int, ...]
    modality: str = "image"
    marks: tuple[tuple[int, ...], ...] = ()

    @property
    def unchanged(self) -> bool:
        """Whether the item stays as vLLM has it."""
        return self.plan == _FULL

    @property
    def what(self) -> str:
        """What it is about, in words."""
        return "a video" if self.modality == "video" else "a picture"

    @property
    def items(self) -> tuple[int, ...]:
        """Placeholders of each item of the library: each run of a picture is one, and a video is one."""
        return items_of(self.modality, self.runs)

    def encoded(self) -> Tensor:
        """`[bytes]` uint8."""
        return torch.tensor(list(json.dumps(asdict(self)).encode()), dtype=torch.uint8)

    @staticmethod
    def decoded(data: Tensor) -> Order:
        """An order from `encoded`."""
        given: dict[str, Any] = json.loads(bytes(data.tolist()))
        given |= {name: tuple(given[name]) for name in ("runs", "kept")}
        return Order(**given | {"marks": tuple(map(tuple, given["marks"]))})


def items_of(modality: str, runs: tuple[int, ...]) -> tuple[int, ...]:
    """Placeholders of each item of the library in one picture or video."""
    return (sum(runs),) if modality == "video" else runs
