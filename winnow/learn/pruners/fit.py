"""Fit a learned method: record what the frozen model shows once, train the method's module on it, write its weights.

A module of this package, named after the method, defines `Recipe(frozen, scale)`: a recipe with its `frozen` model, and
with `questions`, how many of them it wants at scale 1.
"""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Any

from winnow.core.errors import WinnowError
from winnow.core.plan import Plan
from winnow.engine.compress import compress
from winnow.learn.options import RunOptions
from winnow.learn.pruners import trainable
from winnow.learn.pruners.frozen import APART, FIRST, Frozen, questions
from winnow.models.load import load


def fit(
    slug: str,
    out: str | Path | None = None,
    *,
    model: str | None = None,
    resume: bool = False,
    seed: int = 0,
    scale: float = 1.0,
    data: str | Path | None = None,
    device: str | None = None,
    dtype: str | None = None,
    save: int = 100,
    quiet: bool = False,
) -> Path:
    """Train a learned method on a frozen model, and return the file of its weights.

    Args:
        out: the folder of the run; default: runs/SLUG.
        model: an id or a folder of a checkpoint; None is the bundled reference model.
        scale: share of the recipe's questions and steps.
        data: questions as JSON lines, as `winnow bench --data` takes them; default: scenes of winnow's world.
        save: steps between checkpoints.
    """
    if slug not in trainable():
        raise WinnowError(f"{slug!r} is not trained by winnow; these are: {', '.join(trainable())}.")
    options = RunOptions(slug, out, resume, seed, scale, model, data, save, quiet)
    options.begin()
    built, processor = load(model, device=device, dtype=dtype)
    built.set_attn_implementation("eager")  # gradients reach its masks and its weights
    recipes = importlib.import_module(f"winnow.learn.pruners.{slug.replace('-', '_')}")
    with compress(built, Plan(()), processor=processor) as handle:
        task = questions(options.count(recipes.Recipe.questions), seed, None if data is None else Path(data))
        recipe: Any = recipes.Recipe(Frozen(handle, processor, task), scale)
        drawn = f"scenes of the train split from {FIRST + seed * APART} on"
        return options.made(
            recipe,
            recipe.frozen.examples,
            len(task.questions),
            variant={"model": handle.info.fingerprint(), "questions": task.settings["hash"]},
            facts={"name": model or "bundled reference model", "data": drawn if data is None else str(data)},
            device=handle.bound.device,
        )
