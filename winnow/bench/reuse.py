"""One encoding of a batch's pictures for many plans.

What the vision tower computes does not depend on the plan, unless the plan acts at `blocks` or at `features`; so a
sweep encodes once, recording every signal that any plan needs. Timings never do this, and `runner` checks it against
`generate`.
"""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from winnow.bench.requests import Request
from winnow.core.errors import UnsupportedError
from winnow.core.info import ModelInfo
from winnow.core.layout import Layout
from winnow.core.method import Method
from winnow.core.plan import Plan
from winnow.core.point import Point
from winnow.core.signal import Signal
from winnow.core.step import Observe, State, Step
from winnow.core.view import View
from winnow.engine.encoding import record_of
from winnow.engine.handle import Handle


@dataclass(frozen=True)
class Listen(Method):
    """Changes nothing and records these signals of the tower."""

    wanted: tuple[Signal, ...] = ()

    slug: ClassVar[str] = "bench-listen"

    def steps(self, info: ModelInfo) -> tuple[Step, ...]:
        return (Step(Point("projected"), _look, self.wanted),)


def _look(view: View, state: State) -> tuple[Observe, State]:
    return Observe(), state


def listening(handle: Handle, plans: list[Plan]) -> Plan:
    """A plan that records what all of these need from the tower."""
    signals: set[Signal] = set()
    for plan in plans:
        signals.update(handle.bind(plan).tower_signals)
    return Plan((Listen(tuple(sorted(signals, key=repr))),))


@torch.no_grad()
def encode(call: Callable[..., Any], inputs: dict[str, Tensor]) -> Any:
    """What an encoder's method (`get_image_features`, say) gives for the inputs of a forward."""
    return call(**taken_by(call, inputs), return_dict=True)


def taken_by(call: Callable[..., Any], inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    """Those of the inputs of a forward that an encoder's method takes."""
    return {name: inputs[name] for name in inspect.signature(call).parameters if name in inputs}


class Encoded:
    """The encoder outputs of one batch.

    Args:
        reader: from `listening`.
        inputs: of the batch, pixels included.
    """

    def __init__(self, handle: Handle, reader: Plan, inputs: dict[str, Tensor]) -> None:
        self.bound = handle.bound
        self.handle, self.inputs = handle, inputs
        self.modality = "video" if "pixel_values_videos" in inputs else "image"
        self._own: dict[str, Any] = {}
        self._output = self._encode(reader)

    def _encode(self, plan: Plan) -> Any:
        base = self.bound.base
        for name, modality, _ in self.bound.family.encoders:
            if modality == self.modality:
                call = getattr(base, name)
        with self.handle.using(plan):
            return encode(call, self.inputs)

    @property
    def layouts(self) -> tuple[Layout, ...]:
        """The layout of each picture in the LM's sequence."""
        return record_of(self._output).layouts  # type: ignore[union-attr]

    def under(self, plan: Plan) -> Any:
        """Encoder outputs for `mm_encoder_outputs={modality: …}` inside `using(plan)`."""
        bound = self.handle.bind(plan)
        if bound.acts_in_tower:
            return self._encode(plan)
        return dataclasses.replace(self._output, winnow=dataclasses.replace(record_of(self._output), plan=bound))  # type: ignore[type-var]


def layout_of(handle: Handle, request: Request) -> Layout:
    """The layout of a question's picture in the LM's sequence."""
    return Encoded(handle, listening(handle, []), request.inputs).layouts[0]


def check_one_picture_each(layouts: tuple[Layout, ...], rows: int) -> None:
    if len(layouts) != rows:
        raise UnsupportedError(f"{rows} questions gave {len(layouts)} pictures; a question has one picture.")
