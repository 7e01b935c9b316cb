"""Selective S4's chooser, learned in a classifier of long clips: which things are seen, and in which half.

Two phases: masked pieces of clips learn to tell their own clip from others (LSMCL); then classes, from as many tokens
as a budget drawn for each batch keeps. The language model has no part in either; it is asked when all is measured.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn.functional import binary_cross_entropy_with_logits

from winnow.core.view import View
from winnow.learn.connectors import recipe
from winnow.learn.connectors.output import Output
from winnow.learn.fitting import Phase, Record
from winnow.learn.longform.classifier import Selective
from winnow.learn.longform.clips import (
    CELLS,
    CLASSES,
    SECONDS,
    classes_of,
    clip_record,
    enrichment,
    found_in,
    places,
    scores,
    spliced,
)
from winnow.learn.toy import stacked
from winnow.parts.selective import cooled, picked
from winnow.world.clips import Clip

PIECE = SECONDS // 2  # seconds of a short clip
MASKED = 0.5  # share of the tokens that a clip of the contrast is without
MOMENTUM = 0.95
RATIOS = (0.1, 0.25, 0.5)  # of which one is drawn for each batch
KEPT = round(0.1 * SECONDS * CELLS)  # tokens at which it is measured


class Recipe(recipe.Recipe):
    slug = "selective-s4"
    settings: ClassVar = {"keep": 18}
    sizes: ClassVar = {"width": 48, "states": 8}
    clips, steps, batch, rate = 448, 700, 32, 3e-3
    contrasts = 100  # steps of the first phase

    def make(self) -> nn.Module:
        return Selective(self.frozen.info.width, CLASSES, **self.sizes)

    def record(self, seen: Clip) -> Record:
        return super().record(seen) | {f"long.{k}": x for k, x in clip_record(self.frozen.model, seen.seed).items()}

    def output(self, module: Any, view: View) -> Output:
        return super().output(module, replace(view, module=getattr(module, "choose", module)))

    def phases(self, records: Sequence[Record]) -> list[Phase]:
        told = long_clips(records)
        steps = [max(8, round(steps * self.scale)) for steps in (self.contrasts, self.steps)]

        def contrast(module: Any, batch: list[int]) -> Tensor:
            module.follow(MOMENTUM)
            return contrast_of(module, told["tokens"][batch].float(), generator_of(batch, len(records)))

        def classes(module: Any, batch: list[int]) -> Tensor:
            module.follow(MOMENTUM)
            heat = cooled(float(module.updates) / sum(steps))
            g = generator_of(batch, len(records))
            own = spliced({name: x[batch] for name, x in told.items()}, g)
            said = chosen_by_chance(module, own["tokens"].float(), g, heat)
            wanted, weight = classes_of(own["names"]), torch.tensor(3.0)
            return binary_cross_entropy_with_logits(said, wanted, reduction="none", pos_weight=weight).sum(1).mean()

        return [
            Phase("contrast", steps[0], self.batch, self.rate, contrast),
            Phase("classes", steps[1], self.batch, self.rate, classes),
        ]

    @torch.no_grad()
    def measure(self, module: Any, records: Sequence[Record]) -> dict[str, float]:
        """Beside the accuracy of answers: of long clips, the classes that are found, and what kept tokens show."""
        told = long_clips(records)
        score = scores(module.choose, told)
        noise = torch.rand(score.shape, generator=torch.Generator().manual_seed(0))
        found = {
            "found_in_all": found_in(module, told, None),
            "found_in_chosen": found_in(module, told, score, KEPT),
            "found_in_random": found_in(module, told, noise, KEPT),
            "enrichment": enrichment(score, told["names"], KEPT),
        }
        return super().measure(module, records) | {name: float(x.mean()) for name, x in found.items()}


def long_clips(records: Sequence[Record]) -> Record:
    """The long clips of records as one batch."""
    return stacked([{k.removeprefix("long."): x for k, x in r.items() if k.startswith("long.")} for r in records])


def generator_of(batch: list[int], count: int) -> torch.Generator:
    return torch.Generator().manual_seed(batch[0] * count + batch[1])


def contrast_of(module: Selective, tokens: Tensor, g: torch.Generator) -> Tensor:
    """The contrast of whole clips and of a piece of each, both with half of their tokens."""
    start, place = int(torch.randint(SECONDS - PIECE + 1, (1,), generator=g)) * CELLS, places()
    pieces = []
    for first, count in ((0, SECONDS * CELLS), (start, PIECE * CELLS)):
        left = torch.rand(len(tokens), count, generator=g).argsort(1)[:, : round((1 - MASKED) * count)]
        kept = first + left.sort(1).values
        pieces += [picked(tokens, kept), place[kept]]
    return module.contrast(*pieces)


def chosen_by_chance(module: Selective, tokens: Tensor, g: torch.Generator, heat: float) -> Tensor:
    """Logits of classes from tokens that are kept by chance, as their scores have it."""
    ratio = RATIOS[int(torch.randint(len(RATIOS), (1,), generator=g))]
    noise = torch.rand(tokens.shape[:2], generator=g)
    logits: Tensor = module(tokens, places().expand(len(tokens), -1, -1), round(ratio * tokens.shape[1]), noise, heat)
    return logits
