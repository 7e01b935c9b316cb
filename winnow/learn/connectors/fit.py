"""`winnow train SLUG` for a connector: clips recorded once, a module trained on them, and its weights in a file."""

from __future__ import annotations

import importlib
from functools import partial
from pathlib import Path

from winnow.core.errors import WinnowError
from winnow.learn.connectors import trainable
from winnow.learn.connectors.clips import APART, FIRST, Frozen, drawn
from winnow.learn.connectors.recipe import Recipe
from winnow.learn.options import RunOptions
from winnow.models.fingerprint import fingerprint


def recipe_of(slug: str) -> type[Recipe]:
    """Raises WinnowError where no connector of this name is trained."""
    if slug not in trainable():
        raise WinnowError(f"{slug!r} is no connector that winnow trains; these are: {', '.join(trainable())}.")
    made: type[Recipe] = importlib.import_module(f"winnow.learn.connectors.{slug.replace('-', '_')}").Recipe
    return made


def fit(
    slug: str,
    out: str | Path | None = None,
    *,
    model: str | None = None,
    resume: bool = False,
    seed: int = 0,
    scale: float = 1.0,
    save: int = 50,
    quiet: bool = False,
) -> Path:
    """Train a connector on the frozen video model, and return the file of its weights.

    Args:
        out: the folder of the run; default: runs/SLUG.
        model: a folder of `winnow train video`; default: the shipped video reference model.
        scale: share of the recipe's clips and steps.
        save: steps between checkpoints.
    """
    kind = recipe_of(slug)
    options = RunOptions(slug, out, resume, seed, scale, model, save=save, quiet=quiet)
    options.begin()
    frozen, count = Frozen(model), options.count(kind.clips)
    return options.made(
        kind(frozen, scale),
        partial(drawn, seed=seed),
        count,
        variant={"model": fingerprint(frozen.model)},
        facts={
            "name": model or "video reference model",
            "data": f"{count} clips of the train split from {FIRST + seed * APART} on",
        },
    )
