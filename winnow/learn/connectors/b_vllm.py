"""B-VLLM's Q-Formers: the reader first learns to give means over parts of a frame, then both learn from the answers.

In training the shares of frames have Gumbel's noise, and at last none. Rows begin as sharp choices, and the seconds in
which the evidence lies teach what they choose together: of the answers alone they learn to be all one.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.nn.functional import kl_div, pad

from winnow.core.view import View
from winnow.learn.connectors import recipe
from winnow.learn.connectors.clips import GRID, Row, evidence_of, rows_of
from winnow.learn.connectors.output import Output, joined
from winnow.learn.fitting import Phase, Record
from winnow.parts.cubes import sincos
from winnow.parts.frame_parts import share_of_parts

SHARP = 2.0
GROUNDING = 1.0  # what the seconds of the evidence weigh in the loss


class Recipe(recipe.Recipe):
    slug = "b-vllm"
    settings: ClassVar[dict[str, Any]] = {"cap": 18, "frames": 4, "queries": 4}
    sizes: ClassVar[dict[str, int]] = {"frames": 4, "queries": 4, "dim": 96, "heads": 4, "depth": 2}
    clips, steps, each = 900, 200, 2

    def start(self, module: Any) -> None:
        with torch.no_grad():
            module.chooser.wanted.weight.mul_(SHARP)

    def phases(self, records: Sequence[Record]) -> list[Phase]:
        self.records = records
        count = lambda steps: max(8, round(steps * self.scale))  # noqa: E731
        return [
            Phase("means", count(400), 12, 2e-3, self._means),
            Phase("answers", count(self.steps), self.batch, self.rate, self._noisy),
            Phase("still", count(self.steps // 4), self.batch, self.rate / 4, self._loss),
        ]

    def _means(self, module: Any, batch: list[int]) -> Tensor:
        """What is read of each frame, with any question in mind."""
        rows = [row for i in batch for row in rows_of([self.records[i]], asks=True, each=1, seed=i)]
        share = share_of_parts(self.frozen.layout, GRID[1], self.settings["queries"], torch.device("cpu"))
        grid = torch.from_numpy(self.frozen.layout.place[: GRID[1], 2:].copy()).float()
        place, loss = sincos(pad(grid, (1, 0)), self.frozen.info.width), torch.zeros(())
        for own, view in self.frozen.views(rows, self.step, module):
            frames = view.tokens.unflatten(1, GRID).flatten(0, 1)
            text = view[self.step.needs[0]].repeat_interleave(GRID[0], 0)
            wanted = share @ frames
            error = (module.out(module.reader(frames, text, place.expand_as(frames))[0]) - wanted).square().mean()
            loss = loss + error / wanted.var() * len(own) / len(rows)
        return loss

    def _noisy(self, module: Any, batch: list[int]) -> Tensor:
        module.chooser.draws = self.generator
        loss = self._loss(module, batch)
        module.chooser.draws = None
        return loss

    def outputs(self, module: Any, rows: Sequence[Row]) -> Output:
        if not module.training:
            return super().outputs(module, rows)
        views = self.frozen.views(rows, self.step, module)
        return joined([(own, self._taught(module, view, [rows[i] for i in own])) for own, view in views])

    def _taught(self, module: Any, view: View, rows: Sequence[Row]) -> Output:
        means = view.tokens.unflatten(1, GRID).mean(2)
        shares = module.chooser.sure(means, view[self.step.needs[0]]).mean(1)
        loss = kl_div(shares.clamp_min(1e-6).log(), evidence_of(rows), reduction="batchmean")
        return replace(self.output(module, view), losses={"grounding": GROUNDING * loss})
