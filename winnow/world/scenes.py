"""Scenes from a seed, and the evidence of a question as a grid of patches."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from winnow.core.errors import WinnowError
from winnow.core.layout import Layout
from winnow.world.compose import Spec, compose
from winnow.world.items import Box, Scene
from winnow.world.names import SIZES, SPLITS, TYPES
from winnow.world.questions import ask

VERSION = 1  # of the generator: the same version, seed and size give the same bytes
SEEDS_PER_SPLIT = 1 << 48


def scene(
    seed: int,
    size: int = 224,
    split: str = "train",
    spec: Spec | None = None,
    per_type: int = 1,
    types: Sequence[str] = TYPES,
) -> Scene:
    """Draw the scene of a seed and ask about it.

    Each split has 2^48 seeds of its own, so no scene is in two splits; in "heldout_glyphs" every question names a glyph
    that no question of the other splits names. `per_type` bounds the questions of one type.
    """
    if split not in SPLITS:
        raise WinnowError(f"unknown split {split!r}; the splits are {', '.join(SPLITS)}")
    if size not in SIZES:
        raise WinnowError(f"a scene of {size} pixels was asked for; the sizes are {', '.join(map(str, SIZES))}")
    if not 0 <= seed < SEEDS_PER_SPLIT:
        raise WinnowError(f"seed {seed} is outside 0 … {SEEDS_PER_SPLIT - 1}")
    unknown = sorted(set(types) - set(TYPES))
    if unknown:
        raise WinnowError(f"unknown question types {', '.join(unknown)}; the types are {', '.join(TYPES)}")
    spec = spec or Spec()
    held_out = split == "heldout_glyphs"
    if held_out and spec.held_out is None:
        spec = replace(spec, held_out=0.7)
    rng = random.Random(SPLITS.index(split) * SEEDS_PER_SPLIT + seed)
    while True:
        canvas, items = compose(rng, size, spec)
        if items:
            break
    questions = ask(items, size, rng, per_type, types, held_out)
    return Scene(seed, size, split, canvas.pixels, tuple(items), questions)


def fractions(boxes: Sequence[Box], size: int) -> list[tuple[float, float, float, float]]:
    """Pixel boxes as fractions of the picture, as `winnow.core.layout.Layout.covering` takes them."""
    return [(box.x0 / size, box.y0 / size, box.x1 / size, box.y1 / size) for box in boxes]


def evidence_mask(boxes: Sequence[Box], size: int, rows: int, columns: int | None = None) -> np.ndarray:
    """Which patches of a rows × columns grid over a size × size picture show the boxes: bool [rows, columns].

    For the tokens of a model use its own layout: `layout.covering(fractions(question.evidence, scene.size))`.
    """
    layout = Layout.grid(rows, rows if columns is None else columns)
    return layout.covering(fractions(boxes, size)).reshape(rows, -1)
