"""The classifier in which Selective S4 learns to choose: which things a long clip shows, and in which half of it.

Its tokens are those of a frozen video model. Two phases: masked pieces of clips learn to tell their own clip from
others (LSMCL), then classes, from as many tokens as a budget drawn for each batch keeps.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.nn.functional import binary_cross_entropy_with_logits

from winnow.learn.clip_targets import NOTHING, targets
from winnow.learn.fitting import Phase, Record
from winnow.learn.toy import stacked
from winnow.learn.video import tower_tokens
from winnow.parts.selective import Selective, cooled, picked
from winnow.reference.video import MERGE, PATCH, patches
from winnow.world.clips import CLIP_GLYPHS, CLIP_SHAPES, CLIP_WORDS, FPS, ClipSpec, staged

NAMES = (*CLIP_GLYPHS, *CLIP_SHAPES, *CLIP_WORDS)
FRAMES, SIDE = 32, 84
SECONDS, CELLS = FRAMES // FPS, (SIDE // (PATCH * MERGE)) ** 2
# Short visits and words in front of what stands still: most tokens show nothing.
RARE = ClipSpec(things=(1, 2), still=0, hit=0, word=2, cuts=(1,), pan=0)
PIECE = SECONDS // 2  # seconds of a short clip
MASKED = 0.5  # share of the tokens that a clip of the contrast is without
MOMENTUM = 0.95
RATIOS = (0.1, 0.25, 0.5)  # of which one is drawn for each batch
MEASURED = 0.1


class Recipe:
    clips: ClassVar = 480

    def __init__(self, model: Any, scale: float) -> None:
        self.model, self.scale = model, scale
        self.sizes = {"width": 48, "depth": 2, "states": 8, "classes": 2 * len(NAMES)}
        self.settings: dict[str, Any] = {}

    def make(self) -> Selective:
        return Selective(self.model.config.text_config.hidden_size, **self.sizes)

    def record(self, example: tuple[int, str]) -> Record:
        return clip_record(self.model, *example)

    def phases(self, records: Sequence[Record]) -> list[Phase]:
        told, place = stacked(records), places()
        steps = [round(share * self.scale) for share in (60, 400)]

        def contrast(module: Any, batch: list[int]) -> Tensor:
            module.follow(MOMENTUM)
            g = generator_of(batch, len(records))
            tokens = told["tokens"][batch].float()
            start = int(torch.randint(SECONDS - PIECE + 1, (1,), generator=g)) * CELLS
            pieces = []
            for first, count in ((0, SECONDS * CELLS), (start, PIECE * CELLS)):
                left = torch.rand(len(batch), count, generator=g).argsort(1)[:, : round((1 - MASKED) * count)]
                kept = first + left.sort(1).values
                pieces += [picked(tokens, kept), place[kept]]
            return module.contrast(*pieces)

        def classes(module: Any, batch: list[int]) -> Tensor:
            module.follow(MOMENTUM)
            g = generator_of(batch, len(records))
            ratio = RATIOS[int(torch.randint(len(RATIOS), (1,), generator=g))]
            heat = cooled(float(module.updates) / sum(steps))
            tokens = told["tokens"][batch].float()
            noise = torch.rand(tokens.shape[:2], generator=g)
            said = module(tokens, place.expand(len(batch), -1, -1), round(ratio * tokens.shape[1]), noise, heat)
            return loss_of(said, told["classes"][batch])

        return [Phase("contrast", steps[0], 16, 2e-3, contrast), Phase("classes", steps[1], 16, 3e-3, classes)]

    @torch.no_grad()
    def measure(self, module: Any, records: Sequence[Record]) -> dict[str, float]:
        """The share of the classes that are found, and how much more often than by chance kept tokens show things."""
        told = stacked(records)
        keep = round(MEASURED * SECONDS * CELLS)
        noise = torch.rand(told["shows"].shape, generator=torch.Generator().manual_seed(0))
        found = {
            "found_in_all": found_in(module, told, None).mean(),
            "found_in_chosen": found_in(module, told, scores(module, told), keep).mean(),
            "found_in_random": found_in(module, told, noise, keep).mean(),
            "enrichment": enrichment(scores(module, told), told["shows"], keep).mean(),
        }
        return {name: float(value) for name, value in found.items()}


def generator_of(batch: list[int], count: int) -> torch.Generator:
    return torch.Generator().manual_seed(batch[0] * count + batch[1])


@torch.no_grad()
def clip_record(model: Any, seed: int, split: str = "train") -> Record:
    """The tokens of a clip of the frozen model, which of them show a thing, and the classes of the clip."""
    stage, _ = staged(seed, FRAMES, SIDE, split, RARE)
    frames = torch.from_numpy(stage.draw(range(FRAMES)))[None]
    tokens = tower_tokens(model, patches(frames).flatten(0, 1).to(model.dtype)).flatten(0, 1)
    words, _ = targets(stage, range(SECONDS), SIDE // (PATCH * MERGE))
    own = torch.zeros(2, len(NAMES))
    for track in stage.story.tracks:
        for start, _ in track.visits:
            own[2 * start // SECONDS, NAMES.index(track.name)] = 1
    shows = torch.from_numpy(words[..., 0] != NOTHING).flatten()
    return {"tokens": tokens.half(), "classes": own.flatten(), "shows": shows}


def places() -> Tensor:
    """`[V, 3]` frame, row and column of the tokens of a clip."""
    side = math.isqrt(CELLS)
    return torch.cartesian_prod(torch.arange(SECONDS), torch.arange(side), torch.arange(side))


def loss_of(said: Tensor, classes: Tensor) -> Tensor:
    each = binary_cross_entropy_with_logits(said, classes, reduction="none", pos_weight=torch.tensor(3.0))
    return each.sum(1).mean()


def scores(module: Selective, told: Record) -> Tensor:
    """`[clips, V]` of the chooser."""
    tokens = told["tokens"].float()
    sound = torch.ones(tokens.shape[:2], dtype=torch.bool)
    return module.choose(tokens, places().expand(len(tokens), -1, -1), sound)


def found_in(module: Selective, told: Record, score: Tensor | None, keep: int = 0) -> Tensor:
    """`[clips]` the share of its classes among as many of the likeliest, from the tokens that a score keeps, or all."""
    tokens = told["tokens"].float()
    x = module.choose.embed(tokens, places().expand(len(tokens), -1, -1))
    if score is not None:
        x = picked(x, score.topk(keep, 1).indices.sort(1).values)
    said, own = module.classify(x), told["classes"].bool()
    rank = said.argsort(1, descending=True).argsort(1)
    return ((rank < own.sum(1, keepdim=True)) & own).sum(1).double() / own.sum(1)


def enrichment(score: Tensor, shows: Tensor, keep: int) -> Tensor:
    """`[clips]` how many times as often kept tokens show a thing as tokens do."""
    kept = shows.gather(1, score.topk(keep, 1).indices)
    return kept.double().mean(1) / shows.double().mean(1)
