"""The task of clips: questions about what happens over time, with evidence in space and time.

Beside baselines that keep fewer tokens a sweep of clips has three that show less, always: what a question is worth that
needs no clip (`blind`), no order (`shuffled`), or no time (`single-frame`).
"""

from __future__ import annotations

import functools
import json
import random
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from winnow.bench.tasks import Ask, Task, identity
from winnow.core.errors import WinnowError
from winnow.reference import video
from winnow.world.clips import TYPES, VERSION, Clip, ClipQuestion, Sight, clip, stretches

CLIPS_FOR_EACH = 60  # drawn at most for one question of a type
FRAMES, SIDE = 16, 84  # of what the video reference model was trained on


def learned_types(folder: str | Path | None = None) -> tuple[str, ...]:
    """The types of questions that a model has learned, by the card in its folder; all types where it has none.

    Args:
        folder: of the model; None: the shipped one.
    """
    card = (video.path() if folder is None else Path(folder)) / "card.json"
    if not card.is_file():
        return TYPES
    learned = json.loads(card.read_text(encoding="utf-8"))["learned"]
    return tuple(kind for kind in TYPES if kind in learned)


def clip_task(
    count: int,
    *,
    frames: int = FRAMES,
    side: int = SIDE,
    split: str = "test",
    seed: int = 0,
    types: Sequence[str] = TYPES,
) -> Task:
    """`count` questions about clips, as equally many of each type as can be, from consecutive clips."""
    wrong = [kind for kind in types if kind not in TYPES]
    if wrong:
        raise WinnowError(f"Clips ask no questions of {', '.join(wrong)}; allowed: {', '.join(TYPES)}.")
    if count < 1:
        raise WinnowError(f"questions={count}; ask at least 1.")
    left = {kind: count // len(types) + (i < count % len(types)) for i, kind in enumerate(types)}
    asked: list[Ask] = []
    for number in range(seed, seed + CLIPS_FOR_EACH * max(left.values())):
        if not any(left.values()):
            break
        drawn = _clip(number, frames, side, split)
        for place, question in enumerate(drawn.questions):
            if left.get(question.type, 0) > 0:
                left[question.type] -= 1
                asked.append(_ask(drawn, place, question))
    missing = [kind for kind, n in left.items() if n]
    if missing:
        raise WinnowError(
            f"Clips of {frames} frames give too few questions of {', '.join(missing)}; ask fewer than {count}."
        )
    settings = {"task": "clips", "version": VERSION, "split": split, "seed": seed, "frames": frames, "side": side}
    shows = {"blind": blind, "shuffled": shuffled, "single-frame": single_frame}
    return Task(settings | identity(asked), tuple(asked), open_clip, shows=shows)


def _ask(drawn: Clip, place: int, question: ClipQuestion) -> Ask:
    things = [Sight(f, box) for track in drawn.tracks for f, box in enumerate(track.boxes) if box is not None]
    return Ask(
        id=f"clip-{drawn.split}-{drawn.seed:06d}-{place:02d}",
        type=question.type,
        text=question.text,
        truth=question.answer,
        image=f"clip:{drawn.split}:{drawn.seed}:{drawn.frames}:{drawn.side}",
        evidence=tuple(stretches(question.evidence, drawn.side, drawn.frames)),
        objects=tuple(stretches(things, drawn.side, drawn.frames)),
    )


def open_clip(ask: Ask) -> np.ndarray:
    """Draw the clip of a question again: uint8 [frames, side, side, 3]."""
    _, split, seed, frames, side = ask.image.split(":")
    return _clip(int(seed), int(frames), int(side), split).pixels


def blind(pixels: np.ndarray, ask: Ask) -> np.ndarray:
    """An evenly grey clip of the same length."""
    return np.full_like(pixels, 128)


def shuffled(pixels: np.ndarray, ask: Ask) -> np.ndarray:
    """The frames in random order."""
    order = list(range(len(pixels)))
    random.Random(ask.image).shuffle(order)
    return pixels[order]


def single_frame(pixels: np.ndarray, ask: Ask) -> np.ndarray:
    """The middle frame, standing still for as long."""
    return np.repeat(pixels[len(pixels) // 2][None], len(pixels), 0)


@functools.lru_cache(maxsize=64)
def _clip(seed: int, frames: int, side: int, split: str) -> Clip:
    return clip(seed, frames, side, split)
