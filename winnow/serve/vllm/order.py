"""Order: what the front end of vLLM asks the worker to do to one picture, as a tensor that travels with its pixels."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass

import torch
from torch import Tensor

FIELD = "winnow_order"


@dataclass(frozen=True)
class Order:
    """What is to be done to one picture.

    Attributes:
        plan: its key.
        runs: placeholders of each unbroken run that the picture has in the prompt, uncompressed.
        kept: how many of each run stay.
    """

    plan: str
    runs: tuple[int, ...]
    kept: tuple[int, ...]

    def encoded(self) -> Tensor:
        """`[bytes]` uint8."""
        return torch.tensor(list(json.dumps(asdict(self)).encode()), dtype=torch.uint8)

    @staticmethod
    def decoded(data: Tensor) -> Order:
        """An order from `encoded`."""
        given = json.loads(bytes(data.tolist()))
        return Order(given["plan"], tuple(given["runs"]), tuple(given["kept"]))
