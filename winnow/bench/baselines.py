"""What every method is measured against. Baselines are Methods that no plan string can name.

- `full`: the model without compression.
- `random`: M tokens drawn at random, for each question anew.
- `uniform`: M tokens evenly spread over the grid.
- `downsample`: the grid average-pooled to at most M cells, which is the picture made smaller after the tower.
- `seconds`: of a clip, whole frames of tokens evenly spread over time: what sampling fewer frames does.
- `ceiling`: the tokens of the question's evidence, then tokens of other things in the picture, then any: what a method
  could do if it knew where to look.
- `drop-low-energy`: the M loudest tokens of a sound. Silence is most of a sound, so this must be beaten; quiet parts
  matter, so it is not hard to.
- `oracle`: the evidence and nothing else. A diagnostic, not a ceiling: without distractors the task is easier.

Choices that depend on the question come with the request (`Choice`), never from the model or the method.
"""

from __future__ import annotations

import math
import random
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from functools import lru_cache
from typing import ClassVar

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from winnow.bench.tasks import Ask, Boxes
from winnow.core.budget import Budget, split_evenly
from winnow.core.errors import WinnowError
from winnow.core.layout import Layout
from winnow.core.method import Method
from winnow.core.plan import Plan
from winnow.core.reduction import Reduction
from winnow.core.view import View
from winnow.signals.sound import SoundLevel

Choice = tuple[Layout, tuple[int, ...]]  # of one sample: its item's layout, and ascending content ids to keep

LEVEL = SoundLevel()

_choices: ContextVar[Sequence[Choice] | None] = ContextVar("winnow_bench_choices", default=None)


@contextmanager
def choosing(choices: Sequence[Choice] | None) -> Iterator[None]:
    """Say what `Chosen` keeps of each sample of the batch, in this context."""
    token = _choices.set(choices)
    try:
        yield
    finally:
        _choices.reset(token)


@dataclass(frozen=True)
class Chosen(Method):
    """Keep what the request chose (`choosing`). The name and the budget only identify the baseline."""

    name: str = ""
    keep: Budget = Budget(64)

    slug: ClassVar[str] = "baseline-chosen"

    def reduce(self, view: View) -> Reduction:
        given = _choices.get()
        # Views join the samples of equal layout, in the order of the batch.
        own = [ids for layout, ids in given or () if layout == view.layout]
        if len(own) != view.b:
            raise WinnowError(f"{self.name}: {len(own)} choices were given for {view.b} pictures of this layout.")
        counts = tuple(map(len, own))
        index = torch.zeros(view.b, max(counts), dtype=torch.int64)
        for row, ids in enumerate(own):
            index[row, : len(ids)] = torch.tensor(ids, dtype=torch.int64)
        return Reduction.select(index.to(view.tokens.device), view.n, counts=counts)


@dataclass(frozen=True)
class Uniform(Method):
    """Keep M tokens evenly spread over each grid of the item."""

    keep: Budget = Budget(64)

    slug: ClassVar[str] = "baseline-uniform"

    def reduce(self, view: View) -> Reduction:
        ids = torch.tensor(uniform_ids(view.layout, self.keep.of(view)), device=view.tokens.device)
        return Reduction.select(ids.expand(view.b, -1), view.n)


@dataclass(frozen=True)
class Downsample(Method):
    """Average-pool each grid of the item to at most M cells of about its own shape, by area."""

    keep: Budget = Budget(64)

    slug: ClassVar[str] = "baseline-downsample"

    def reduce(self, view: View) -> Reduction:
        matrix, representative = _pooling(view.layout, self.keep.of(view))
        weights = matrix.to(view.tokens.device).expand(view.b, -1, -1)
        return Reduction.mix(weights, representative=representative.to(view.tokens.device).expand(view.b, -1))


@dataclass(frozen=True)
class Seconds(Method):
    """Keep whole frames of tokens, evenly spread over time; of the last as many as are left, spread over it."""

    keep: Budget = Budget(64)

    slug: ClassVar[str] = "baseline-seconds"

    def reduce(self, view: View) -> Reduction:
        ids = torch.tensor(whole_frames(view.layout, self.keep.of(view)), device=view.tokens.device)
        return Reduction.select(ids.expand(view.b, -1), view.n)


@dataclass(frozen=True)
class DropLowEnergy(Method):
    """Keep the M loudest tokens of a sound, in their order."""

    keep: Budget = Budget(64)
    level: SoundLevel = LEVEL

    slug: ClassVar[str] = "baseline-drop-low-energy"
    modalities: ClassVar[tuple[str, ...]] = ("audio",)

    def score(self, view: View) -> Tensor:
        if view.layout.seconds is None:
            raise WinnowError("drop-low-energy is a baseline of sounds; a picture or a video has no energy to drop.")
        return view[self.level]


BASELINES = ("random", "uniform", "downsample", "ceiling", "oracle")
OF_CLIPS = ("seconds",)
OF_SOUNDS = ("random", "uniform", "downsample", "drop-low-energy")
KNOWN = tuple(dict.fromkeys((*BASELINES, *OF_CLIPS, *OF_SOUNDS)))
LABELS = {"seconds": "seconds-M", "random": "random-M", "uniform": "uniform-M", "downsample": "downsample-M"}
PER_QUESTION = ("random", "ceiling", "oracle")
NEED_EVIDENCE = ("ceiling", "oracle")


def baseline_plan(name: str, budget: int | float | str) -> Plan:
    """The plan of a baseline at a budget; `Chosen` ones also need `choosing` around each request."""
    if name not in KNOWN:
        raise WinnowError(f"Unknown baseline {name!r}; baselines are full, {', '.join(KNOWN)}.")
    keep = Budget(budget)
    if name == "drop-low-energy":
        return Plan((DropLowEnergy(keep),))
    if name == "uniform":
        return Plan((Uniform(keep),))
    if name == "seconds":
        return Plan((Seconds(keep),))
    if name == "downsample":
        return Plan((Downsample(keep),))
    return Plan((Chosen(name, keep),))


def choose(name: str, ask: Ask, layout: Layout, m: int, evidence: Boxes, objects: Boxes, seed: int = 0) -> Choice:
    """Content ids that a baseline keeps for one question.

    Args:
        m: content tokens to keep; the oracle keeps fewer where there is less evidence.
        evidence, objects: fractions of what the model is shown.
    """
    rng = random.Random(f"{seed}:{ask.id}")
    everything = list(range(layout.n_content))
    if name == "random":
        return layout, tuple(sorted(rng.sample(everything, m)))
    matters = np.flatnonzero(layout.covering(evidence)).tolist()
    if name == "oracle":
        if not matters:  # an answer that is an absence depends on the whole picture
            return layout, uniform_ids(layout, m)
        return layout, tuple(sorted(rng.sample(matters, min(m, len(matters)))))
    company = np.flatnonzero(layout.covering(objects)).tolist()
    chosen: dict[int, None] = {}
    for group in (matters, company, everything):
        chosen.update(dict.fromkeys(rng.sample(group, len(group))))
    return layout, tuple(sorted(list(chosen)[:m]))


@lru_cache(maxsize=256)
def uniform_ids(layout: Layout, m: int) -> tuple[int, ...]:
    """M content ids, evenly spread over the rows and columns of each grid of the layout."""
    grids = _grids(layout)
    found: list[int] = []
    for ids, share in zip(grids, split_evenly(m, [g.size for g in grids]), strict=True):
        h, w = ids.shape
        rows = max(-(-share // w), min(h, share, round(math.sqrt(share * h / w)))) if share else 0
        for i in range(rows):
            own = share // rows + (i < share % rows)
            row = ids[int((i + 0.5) * h / rows)]
            found += [int(row[int((j + 0.5) * w / own)]) for j in range(own)]
    return tuple(sorted(found))


@lru_cache(maxsize=256)
def whole_frames(layout: Layout, m: int) -> tuple[int, ...]:
    """M content ids: all of evenly spaced frames, and of one more what is left, evenly spread over it."""
    frames = _grids(layout)
    if len(frames) < 2:
        raise WinnowError("This item has one frame, so no frames can be left out; use `uniform`.")
    size = frames[0].size
    number = -(-m // size)
    chosen = [frames[int((i + 0.5) * len(frames) / number)].reshape(-1) for i in range(number)]
    left = m - size * (number - 1)
    last = [int(chosen[-1][int((i + 0.5) * size / left)]) for i in range(left)]
    return tuple(sorted([*(int(i) for ids in chosen[:-1] for i in ids), *last]))


def _grids(layout: Layout) -> list[np.ndarray]:
    """The content ids of each (grid, frame), as `[rows, columns]`."""
    place = layout.place[layout.content]
    found = []
    for grid, frame in sorted({(int(g), int(t)) for g, t in place[:, :2]}):
        mine = np.flatnonzero((place[:, 0] == grid) & (place[:, 1] == frame))
        row, col = place[mine, 2], place[mine, 3]
        table = np.full((row.max() - row.min() + 1, col.max() - col.min() + 1), -1)
        table[row - row.min(), col - col.min()] = mine
        if (table < 0).any():
            raise WinnowError("This layout is not a full grid, so it cannot be sampled evenly or pooled.")
        found.append(table)
    return found


@lru_cache(maxsize=64)
def _pooling(layout: Layout, m: int) -> tuple[torch.Tensor, torch.Tensor]:
    """`[M', V]` weights and `[M']` representatives of the pooled cells, M' ≤ M."""
    grids = _grids(layout)
    blocks: list[np.ndarray] = []
    representatives: list[int] = []
    for ids, share in zip(grids, split_evenly(m, [g.size for g in grids]), strict=True):
        if not share:
            continue
        h, w = ids.shape
        rows = min(h, max(1, -(-share // w), round(math.sqrt(share * h / w))))
        rows = min(rows, share)
        cols = min(w, share // rows)
        weights = np.kron(_areas(h, rows), _areas(w, cols))  # rows · cols, h · w
        block = np.zeros((rows * cols, layout.n_content), dtype=np.float32)
        block[:, ids.reshape(-1)] = weights
        blocks.append(block)
        middle = [ids[int((i + 0.5) * h / rows), int((j + 0.5) * w / cols)] for i in range(rows) for j in range(cols)]
        representatives += map(int, middle)
    order = np.argsort(representatives, kind="stable")
    return torch.from_numpy(np.concatenate(blocks)[order]), torch.tensor(representatives)[torch.from_numpy(order)]


def _areas(n: int, m: int) -> Float[np.ndarray, "m n"]:
    """How much of each of n unit cells lies in each of m equal parts, as weights that sum to one for a part."""
    edges = np.arange(m + 1) * (n / m)
    cells = np.arange(n)
    overlap = np.minimum(edges[1:, None], cells + 1) - np.maximum(edges[:-1, None], cells)
    return np.clip(overlap, 0, None) / (n / m)
