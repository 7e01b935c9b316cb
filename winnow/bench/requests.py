"""Requests: questions as a model takes them, in batches in which nothing is padded."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence, Set
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from winnow.bench.tasks import Ask, Boxes, Task
from winnow.core.errors import WinnowError
from winnow.models.inputs import model_inputs
from winnow.overlay import shown_box
from winnow.reference.video import ClipProcessor

PIXELS = ("pixel_values", "pixel_values_videos")
SIZES = ("image_sizes", "image_grid_thw", "video_grid_thw")  # pictures of equal sizes have equal layouts


@dataclass(frozen=True)
class Request:
    """One question, ready to be asked. Boxes are fractions of what the model is shown."""

    ask: Ask
    inputs: dict[str, Tensor]
    evidence: Boxes
    objects: Boxes


def request(model: Any, processor: Any, task: Task, ask: Ask, show: str = "") -> Request:
    """Raises WinnowError when the model cannot be asked this.

    Args:
        show: of `task.shows`; "" shows all.
    """
    picture = task.open(ask)
    if isinstance(picture, np.ndarray):
        return _of_clip(model, processor, task.shows[show](picture, ask) if show else picture, ask)
    shown = shown_box(processor, picture.size)
    return Request(
        ask,
        model_inputs(model, processor, picture, ask.text),
        _as_shown(ask.evidence, shown, picture.size),
        _as_shown(ask.objects, shown, picture.size),
    )


def _of_clip(model: Any, processor: Any, frames: np.ndarray, ask: Ask) -> Request:
    if not isinstance(processor, ClipProcessor):
        raise WinnowError(
            f"Clips are asked of the video reference model, not through {type(processor).__name__}; see "
            "`winnow.reference.video.load`."
        )
    made = processor(frames, ask.text)
    inputs = {
        n: x.to(model.device, model.dtype if x.is_floating_point() and n in PIXELS else None) for n, x in made.items()
    }
    return Request(ask, inputs, ask.evidence, ask.objects)


def _as_shown(boxes: Boxes, shown: tuple[float, ...], size: tuple[int, int]) -> Boxes:
    """Fractions of the picture to fractions of the part that the model is shown."""
    x0, y0, x1, y1 = shown
    wide, high = x1 - x0, y1 - y0
    (w, h) = size
    return tuple(
        ((a * w - x0) / wide, (b * h - y0) / high, (c * w - x0) / wide, (d * h - y0) / high) for a, b, c, d in boxes
    )


@dataclass(frozen=True)
class Batches:
    """Questions by the shapes of their inputs: a batch of equal shapes computes what its questions compute alone.

    Attributes:
        alike: questions whose inputs have equal shapes, group by group.
        bad: the questions that cannot be asked, each with the reason.
    """

    size: int
    alike: tuple[tuple[Ask, ...], ...]
    bad: tuple[str, ...]

    @property
    def batches(self) -> tuple[tuple[Ask, ...], ...]:
        """Of all questions, `size` at a time."""
        return self._cut(frozenset(self.pictures))

    @property
    def pictures(self) -> tuple[str, ...]:
        """Those that are asked about."""
        return tuple(dict.fromkeys(ask.image for own in self.alike for ask in own))

    def windows(self, count: int) -> tuple[tuple[tuple[Ask, ...], ...], ...]:
        """Batches of the questions about a part of the pictures, for `count` parts of about as many questions."""
        asked = Counter(ask.image for own in self.alike for ask in own)
        parts: list[set[str]] = [set() for _ in range(count)]
        before, total = 0, asked.total()
        for picture in sorted(asked):
            parts[before * count // total].add(picture)
            before += asked[picture]
        return tuple(self._cut(part) for part in parts if part)

    def _cut(self, pictures: Set[str]) -> tuple[tuple[Ask, ...], ...]:
        chosen = [[ask for ask in own if ask.image in pictures] for own in self.alike]
        return tuple(tuple(own[at : at + self.size]) for own in chosen for at in range(0, len(own), self.size))


def batches(model: Any, processor: Any, task: Task, size: int) -> Batches:
    """Questions of a task, `size` at a time."""
    groups: dict[Any, list[Ask]] = defaultdict(list)
    bad: list[str] = []
    for ask in task.questions:
        try:
            inputs = request(model, processor, task, ask).inputs
        except WinnowError as error:
            bad.append(f"{ask.id}: {error}")
            continue
        shapes = tuple((name, tuple(x.shape)) for name, x in sorted(inputs.items()))
        sizes = tuple(tuple(inputs[name].flatten().tolist()) for name in SIZES if name in inputs)
        groups[shapes, sizes].append(ask)
    if not groups:
        raise WinnowError(f"No question can be asked: {'; '.join(bad[:3])}")
    ordered = sorted(groups.items(), key=lambda pair: repr(pair[0]))
    return Batches(size, tuple(tuple(own) for _, own in ordered), tuple(bad))


def one_of_each_picture(window: Iterable[Sequence[Ask]]) -> list[Ask]:
    """A question about each picture that some batches ask about."""
    return list({ask.image: ask for batch in window for ask in batch}.values())


def joined(requests: Sequence[Request]) -> dict[str, Tensor]:
    """The inputs of a batch."""
    return {name: torch.cat([r.inputs[name] for r in requests]) for name in requests[0].inputs}


def without_pixels(inputs: dict[str, Tensor], also: Iterable[str] = ()) -> dict[str, Tensor]:
    return {name: x for name, x in inputs.items() if name not in (*PIXELS, *also)}
