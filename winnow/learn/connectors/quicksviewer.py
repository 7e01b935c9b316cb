"""Quicksviewer's cubes: where they begin, and what is read of each.

The reader first learns to give means over parts of the picture in each cube, with borders by the size of the change;
then all of it learns from the answers, borders with a little of Gumbel's noise, and at last with none.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from winnow.core.view import View
from winnow.learn.connectors import recipe
from winnow.learn.connectors.clips import GRID, rows_of
from winnow.learn.connectors.output import Output
from winnow.learn.fitting import Phase, Record
from winnow.methods.quicksviewer import Quicksviewer
from winnow.parts.cubes import hardened, map_of, number_of_cubes, starts_of, thumbnail_of

NOISE = 0.1


class Recipe(recipe.Recipe):
    slug = "quicksviewer"
    settings: ClassVar[dict[str, Any]] = {"frames": 2, "queries": 4}
    sizes: ClassVar[dict[str, int]] = {"queries": 4}
    clips, steps = 900, 260

    def phases(self, records: Sequence[Record]) -> list[Phase]:
        self.records = records
        count = lambda steps: max(8, round(steps * self.scale))  # noqa: E731
        return [
            Phase("means", count(300), 24, 2e-3, self._means),
            Phase("answers", count(self.steps), self.batch, self.rate, self._noisy),
            Phase("still", count(self.steps // 4), self.batch, self.rate / 4, self._still),
        ]

    def _means(self, module: nn.Module, batch: list[int]) -> Tensor:
        rows = [row for i in batch for row in rows_of([self.records[i]], asks=False, each=1, seed=i)]
        loss = torch.zeros(())
        for own, view in self.frozen.views(rows, self.step, module):
            free = Quicksviewer(**{**self.settings, "borders": "diff-norm", "tokens": "mean"})
            x = view.tokens.unflatten(1, GRID)
            begins = torch.cat([free.begins(one, None, number_of_cubes(GRID[0], free.frames)) for one in x.split(1)])
            means: Any = free.read(view)
            wanted = means.apply(view.tokens)
            error = (self._read(module, view, begins).tokens - wanted).square().mean()
            loss = loss + error / wanted.var() * len(own) / len(rows)
        return loss

    def _noisy(self, module: Any, batch: list[int]) -> Tensor:
        self.noise = NOISE
        return self._loss(module, batch)

    def _still(self, module: Any, batch: list[int]) -> Tensor:
        self.noise = 0.0
        return self._loss(module, batch)

    def output(self, module: Any, view: View) -> Output:
        if not module.training:
            return super().output(module, view)
        means = view.tokens.unflatten(1, GRID).mean(2)
        score = module.cubing.noisy(means, self.noise, self.generator) if self.noise else module.cubing(means)
        return self._read(module, view, hardened(score, number_of_cubes(GRID[0], self.settings["frames"]) - 1))

    @staticmethod
    def _read(module: Any, view: View, begins: Tensor) -> Output:
        """All rows of a view together, with cubes that begin where they are told to."""
        x = view.tokens.unflatten(1, GRID)
        starts = starts_of(begins, int(begins[0].detach().sum()))
        pooled = thumbnail_of(GRID[1], Quicksviewer().pool, x.device)
        broken = torch.zeros(x.shape[:3], dtype=torch.bool)
        place = torch.from_numpy(view.layout.place[: GRID[1], 2:].copy()).float().expand(view.b, -1, -1)
        tokens, weights = module.reader(pooled, x, broken, place, begins, starts)
        at = map_of(weights.detach(), begins.detach(), broken, pooled, starts, view.ids).representatives
        return Output(tokens, at)
