"""VideoStreaming's recurrent memory: it first learns to give means over parts of frames, then from the answers.

Which clips are chosen is a top-k with Gumbel's noise and a straight-through gradient, and the seconds in which the
evidence lies teach the indicators.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn.functional import kl_div

from winnow.core.view import View
from winnow.learn.connectors import recipe
from winnow.learn.connectors.clips import GRID, Row, evidence_of
from winnow.learn.connectors.output import Output, joined
from winnow.learn.fitting import Phase, Record
from winnow.parts.evenly import evenly
from winnow.parts.frame_parts import share_of_parts
from winnow.parts.gumbel import gumbel
from winnow.parts.recurrent_memory import SCALE, best_clips

GROUNDING = 0.5  # what the seconds of the evidence weigh in the loss


class Recipe(recipe.Recipe):
    slug = "videostreaming"
    settings: ClassVar[dict[str, Any]] = {"clip": 1, "per_frame": 4, "chosen": 4}
    sizes: ClassVar[dict[str, int]] = {"dim": 128, "heads": 4, "depth": 2}
    clips, steps = 720, 300

    def phases(self, records: Sequence[Record]) -> list[Phase]:
        self.records = records
        self.share = share_of_parts(self.frozen.layout, GRID[1], self.settings["per_frame"], torch.device("cpu"))
        place = self.frozen.layout.place[: GRID[1], 2:]
        self.place = torch.from_numpy(place.copy()).float()[None]
        count = lambda steps: max(8, round(steps * self.scale))  # noqa: E731
        return [
            Phase("means", count(300), 24, 2e-3, self._means),
            Phase("answers", count(self.steps), self.batch, self.rate, self._loss),
        ]

    def _means(self, module: Any, batch: list[int]) -> Tensor:
        """The memory of each clip, without what came before."""
        x = torch.stack([self.records[i]["tokens"].float() for i in batch]).unflatten(1, GRID)
        memory, _, _ = module.memories(x, self.share, self.place.expand(len(x), -1, -1))
        wanted = self.share @ x
        return (module.out(memory) - wanted).square().mean() / wanted.var()

    def outputs(self, module: nn.Module, rows: Sequence[Row]) -> Output:
        if not module.training:
            return super().outputs(module, rows)
        views = self.frozen.views(rows, self.step, module)
        return joined([(own, self._drawn(module, view, [rows[i] for i in own])) for own, view in views])

    def _drawn(self, module: Any, view: View, rows: Sequence[Row]) -> Output:
        """The memory of clips that are drawn by how well they fit, all rows of a view together."""
        x = view.tokens.unflatten(1, GRID)
        memory, scores, _ = module(x, view[self.step.needs[0]], self.share, self.place.expand(view.b, -1, -1))
        fit = SCALE * scores
        best = best_clips((fit + gumbel(fit, self.generator)).detach(), self.settings["chosen"], False)
        share = fit.softmax(1).gather(1, best)
        through = (1 + share - share.detach())[..., None, None]
        tokens = memory.gather(1, best[..., None, None].expand(-1, -1, *memory.shape[2:])) * through
        cells = evenly(GRID[1], len(self.share), x.device)
        at = best[..., None] * GRID[1] + cells
        wanted = evidence_of(rows)
        loss = GROUNDING * kl_div(fit.log_softmax(1), wanted, reduction="batchmean")
        return Output(tokens.flatten(1, 2), at.flatten(1), losses={"grounding": loss})
