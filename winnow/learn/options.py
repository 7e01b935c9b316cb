"""What a user says of a run of training, and the run that follows from it."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from winnow.core.errors import WinnowError
from winnow.learn.fitting import Recipe, Run
from winnow.learn.progress import Log

LEAST = 16  # examples
MAX_SEED = 1024
CPU = torch.device("cpu")


@dataclass(frozen=True)
class RunOptions:
    """What a user says of a run.

    Args:
        slug: of the method, or of what else is trained.
        out: the folder; default: runs/SLUG.
        model, data: as the command takes them, where it does.
        scale: share of the recipe's examples and steps.
        save: steps between checkpoints.
    """

    slug: str
    out: str | Path | None = None
    resume: bool = False
    seed: int = 0
    scale: float = 1.0
    model: str | None = None
    data: str | Path | None = None
    save: int = 100
    quiet: bool = False

    @property
    def folder(self) -> Path:
        return Path(self.out) if self.out is not None else Path("runs") / self.slug

    @property
    def command(self) -> str:
        """The command that makes the weights again, without what it need not be told."""
        given = {
            "model": self.model,
            "seed": self.seed or None,
            "scale": None if self.scale == 1 else self.scale,
            "data": self.data,
        }
        return f"winnow train {self.slug}" + "".join(f" --{k} {v}" for k, v in given.items() if v is not None)

    def begin(self) -> None:
        """See that the run may begin or go on; from here on torch uses one thread.

        Raises:
            WinnowError: a seed or a scale out of bounds, or a folder with a run that is not to be resumed.
        """
        if not 0 < self.scale < math.inf or not 0 <= self.seed < MAX_SEED:
            raise WinnowError(
                f"scale {self.scale}, seed {self.seed}; scale is above 0, and seed is 0 … {MAX_SEED - 1}."
            )
        if (self.folder / "cache").exists() and not self.resume:
            raise WinnowError(f"{self.folder} already holds a run; continue it with resume, or choose another folder.")
        torch.set_num_threads(1)

    def count(self, examples: int) -> int:
        """How many of a recipe's examples are recorded."""
        return max(LEAST, round(examples * self.scale))

    def made(
        self,
        recipe: Recipe,
        examples: Callable[[int, int], Iterable[Any]],
        count: int,
        *,
        variant: dict[str, Any],
        facts: dict[str, Any],
        device: torch.device = CPU,
    ) -> Path:
        """Carry the run out, and return the file of the weights.

        Args:
            examples: what is recorded, from a number to another; there are `count`.
            variant: what tells this run from others, beside the options: the `model`.
            facts: what is said of it beside the weights: the model's `name` and the `data`.
            device: where the module is trained.
        """
        whole = {"method": self.slug, "seed": self.seed, "scale": self.scale, **variant}
        log = Log(self.folder, self.quiet)
        run = Run(self.folder, recipe, whole, log, self.save, examples, device)
        return run.made(count, {"command": self.command, **facts})
