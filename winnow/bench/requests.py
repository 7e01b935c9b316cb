"""Requests: questions as a model takes them, in batches in which nothing is padded, or in those of whole pictures."""

from __future__ import annotations

import itertools
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence, Set
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from winnow.bench.tasks import Ask, Boxes, Task
from winnow.core.errors import WinnowError
from winnow.engine.prepared import AS_LONG, widened
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
        whole: questions about pictures of equal shapes, group by group, those about one picture together. A batch of
            them is padded, and many of its prompts begin alike.
    """

    size: int
    alike: tuple[tuple[Ask, ...], ...]
    bad: tuple[str, ...]
    whole: tuple[tuple[Ask, ...], ...] = ()

    @property
    def batches(self) -> tuple[tuple[Ask, ...], ...]:
        """Of all questions, `size` at a time."""
        return self._cut(frozenset(self.pictures))

    @property
    def pictures(self) -> tuple[str, ...]:
        """Those that are asked about."""
        return tuple(dict.fromkeys(ask.image for own in self.alike for ask in own))

    def windows(self, count: int) -> tuple[Window, ...]:
        """Batches of the questions about a part of the pictures, for `count` parts of about as many questions."""
        asked = Counter(ask.image for own in self.alike for ask in own)
        parts: list[set[str]] = [set() for _ in range(count)]
        before, total = 0, asked.total()
        for picture in sorted(asked):
            parts[before * count // total].add(picture)
            before += asked[picture]
        return tuple(Window(self._cut(part), self._cut_whole(part)) for part in parts if part)

    def _cut_whole(self, pictures: Set[str]) -> tuple[tuple[Ask, ...], ...]:
        """Batches that part no picture of at most `size` questions."""
        made: list[list[Ask]] = []
        for group in self.whole:
            own: list[Ask] = []
            for _, asks in itertools.groupby((ask for ask in group if ask.image in pictures), lambda ask: ask.image):
                more = list(asks)
                if own and len(own) + len(more) > self.size:
                    made.append(own)
                    own = []
                own += more
                while len(own) > self.size:
                    made.append(own[: self.size])
                    own = own[self.size :]
            made += [own] if own else []
        return tuple(map(tuple, made))

    def _cut(self, pictures: Set[str]) -> tuple[tuple[Ask, ...], ...]:
        chosen = [[ask for ask in own if ask.image in pictures] for own in self.alike]
        return tuple(tuple(own[at : at + self.size]) for own in chosen for at in range(0, len(own), self.size))


@dataclass(frozen=True)
class Window:
    """Batches of the questions about some pictures.

    Attributes:
        alike: of equal shapes.
        whole: of whole pictures; the same questions.
    """

    alike: tuple[tuple[Ask, ...], ...]
    whole: tuple[tuple[Ask, ...], ...]

    @property
    def questions(self) -> list[Ask]:
        return [ask for own in self.alike for ask in own]

    @property
    def rows(self) -> int:
        """Of the largest batch of equal shapes."""
        return max(map(len, self.alike))


def batches(model: Any, processor: Any, task: Task, size: int) -> Batches:
    """Questions of a task, `size` at a time."""
    groups: dict[Any, list[Ask]] = defaultdict(list)
    pictures: dict[Any, dict[str, list[tuple[int, Ask]]]] = defaultdict(lambda: defaultdict(list))
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
        fixed = tuple((name, shape) for name, shape in shapes if name not in AS_LONG or "attention_mask" not in inputs)
        pictures[fixed, sizes][ask.image].append((inputs["input_ids"].shape[-1], ask))
    if not groups:
        raise WinnowError(f"No question can be asked: {'; '.join(bad[:3])}")
    ordered = sorted(groups.items(), key=lambda pair: repr(pair[0]))
    whole = sorted(pictures.items(), key=lambda pair: repr(pair[0]))
    return Batches(size, tuple(tuple(own) for _, own in ordered), tuple(bad), tuple(_whole(own) for _, own in whole))


def _whole(pictures: Mapping[str, Sequence[tuple[int, Ask]]]) -> tuple[Ask, ...]:
    """Questions picture by picture; pictures of one question first, then those with prompts about as long together."""
    ranked = sorted(pictures.values(), key=lambda own: (len(own) > 1, max(length for length, _ in own)))
    return tuple(ask for own in ranked for _, ask in own)


def one_of_each_picture(window: Window) -> list[Ask]:
    """A question about each of its pictures."""
    return list({ask.image: ask for ask in window.questions}.values())


def joined(requests: Sequence[Request], pad: int | None = None) -> dict[str, Tensor]:
    """The inputs of a batch.

    Args:
        pad: the id of padding, on the left, where prompts are of unequal lengths.
    """
    inputs = [r.inputs for r in requests]
    if pad is not None:
        width = max(own["input_ids"].shape[-1] for own in inputs)
        inputs = [widened(own, width, pad) for own in inputs]
    return {name: torch.cat([own[name] for own in inputs]) for name in inputs[0]}


def without_pixels(inputs: dict[str, Tensor], also: Iterable[str] = ()) -> dict[str, Tensor]:
    return {name: x for name, x in inputs.items() if name not in (*PIXELS, *also)}
