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
from winnow.learn.fitting import LEAST, Run, command_of, folder_of
from winnow.learn.progress import Log
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
    folder = folder_of(slug, out, resume=resume, seed=seed, scale=scale)
    built, processor = load(model, device=device, dtype=dtype)
    built.set_attn_implementation("eager")  # gradients reach its masks and its weights
    recipes = importlib.import_module(f"winnow.learn.pruners.{slug.replace('-', '_')}")
    with compress(built, Plan(()), processor=processor) as handle:
        count = max(LEAST, round(recipes.Recipe.questions * scale))
        task = questions(count, seed, None if data is None else Path(data))
        recipe: Any = recipes.Recipe(Frozen(handle, processor, task), scale)
        variant = {
            "method": slug,
            "model": handle.info.fingerprint(),
            "seed": seed,
            "scale": scale,
            "questions": task.settings["hash"],
        }
        run = Run(folder, recipe, variant, Log(folder, quiet), save, recipe.frozen.examples, handle.bound.device)
        drawn = f"scenes of the train split from {FIRST + seed * APART} on"
        facts = {
            "command": command_of(slug, seed=seed, scale=scale, model=model, data=data),
            "name": model or "bundled reference model",
            "data": drawn if data is None else str(data),
        }
        return run.made(len(task.questions), facts)
