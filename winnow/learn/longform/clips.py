"""Long clips in which little happens, the classes of a clip, and how well they are found in chosen tokens."""

from __future__ import annotations

import math
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from winnow.learn.clip_targets import targets
from winnow.learn.fitting import Record
from winnow.learn.longform.classifier import Selective
from winnow.learn.video import tower_tokens
from winnow.parts.selective import Chooser, picked
from winnow.reference.video import MERGE, PATCH, TOKEN_ID, patches
from winnow.world.clips import CLIP_GLYPHS, CLIP_SHAPES, CLIP_WORDS, FPS, ClipSpec, staged

NAMES = (*CLIP_GLYPHS, *CLIP_SHAPES, *CLIP_WORDS)
CLASSES = 2 * len(NAMES)  # what is seen in the first half of the clip, and what in the second
FRAMES, SIDE = 32, 84
SECONDS, CELLS = FRAMES // FPS, (SIDE // (PATCH * MERGE)) ** 2
# Short visits and words before what stands still: most tokens show nothing.
RARE = ClipSpec(things=(1, 2), still=0, hit=0, word=2, cuts=(1,), pan=0)


@torch.no_grad()
def clip_record(model: Any, seed: int, split: str = "train") -> Record:
    """The tokens of a clip of the frozen model, and the name that each of them shows: its number, or −1."""
    stage, _ = staged(seed, FRAMES, SIDE, split, RARE)
    frames = torch.from_numpy(stage.draw(range(FRAMES)))[None]
    tokens = tower_tokens(model, patches(frames).flatten(0, 1).to(model.dtype)).flatten(0, 1)
    words, _ = targets(stage, range(SECONDS), SIDE // (PATCH * MERGE))
    return {"tokens": tokens.half(), "names": _NUMBER[torch.from_numpy(words[..., 0]).long()].flatten()}


_NUMBER = torch.full((len(TOKEN_ID),), -1)
_NUMBER[[TOKEN_ID[name] for name in NAMES]] = torch.arange(len(NAMES))


def classes_of(names: Int[Tensor, "b v"]) -> Float[Tensor, "b y"]:
    """1 for each name that is seen in a half of a clip."""
    found = torch.zeros(*names.shape[:1], 2, len(NAMES) + 1)
    return found.scatter_(2, names.unflatten(1, (2, -1)) + 1, 1)[..., 1:].flatten(1)


def spliced(told: Record, g: torch.Generator) -> Record:
    """Clips in which half of the seconds are those of others, so that no clip is learned by heart."""
    b = len(told["names"])
    other = torch.randint(b, (b, SECONDS), generator=g)
    source = torch.where(torch.rand(b, SECONDS, generator=g) < 0.5, torch.arange(b)[:, None], other)
    second = torch.arange(SECONDS)
    return {name: x.unflatten(1, (SECONDS, CELLS))[source, second].flatten(1, 2) for name, x in told.items()}


def places() -> Int[Tensor, "v 3"]:
    """Frame, row and column of the tokens of a clip."""
    side = math.isqrt(CELLS)
    return torch.cartesian_prod(torch.arange(SECONDS), torch.arange(side), torch.arange(side))


def scores(chooser: Chooser, told: Record) -> Float[Tensor, "b v"]:
    """Of the tokens of some clips."""
    tokens = told["tokens"].float()
    sound = torch.ones(tokens.shape[:2], dtype=torch.bool)
    return chooser(tokens, places().expand(len(tokens), -1, -1), sound)


def found_in(module: Selective, told: Record, score: Tensor | None, keep: int = 0) -> Float[Tensor, " b"]:
    """The share of a clip's classes among as many of the likeliest, from the tokens that a score keeps, or from all."""
    tokens = told["tokens"].float()
    x = module.choose.embed(tokens, places().expand(len(tokens), -1, -1))
    if score is not None:
        x = picked(x, score.topk(keep, 1).indices.sort(1).values)
    said, own = module.classify(x), classes_of(told["names"]).bool()
    rank = said.argsort(1, descending=True).argsort(1)
    return ((rank < own.sum(1, keepdim=True)) & own).sum(1).double() / own.sum(1)


def enrichment(score: Float[Tensor, "b v"], names: Int[Tensor, "b v"], keep: int) -> Float[Tensor, " b"]:
    """How many times as often kept tokens show a thing as tokens of the clip do."""
    shows = names >= 0
    kept = shows.gather(1, score.topk(keep, 1).indices)
    return kept.double().mean(1) / shows.double().mean(1)
