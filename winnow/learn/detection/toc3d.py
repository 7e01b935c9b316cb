"""ToC3D: object queries of the moment before say which tokens of a detector go the slow path.

Two phases: the detector without routing, then both together, as the authors fine-tune a trained one. The first moment
of a drive has no history; its tokens are scored by themselves, and what is found there is the history of the second.

Departs from the paper: the detector is a toy of ours with no temporal attention, on drives of `winnow.world.streets`;
16 queries of its own width, two selectors in six blocks, and a velocity of 0, since one moment shows none. Masks are
noisy in training only.
Departs from the released code: the representative is weighted by the probabilities of being salient (code: by their
logarithms over their sum, so that the least salient token weighs most; `legacy=True`).
Not seen on the toy: that scores stand on history. Given the history of another drive they find as much, because here
the look of a token gives an object away.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from winnow.core.errors import WinnowError
from winnow.core.info import ModelInfo
from winnow.learn.detection.detector import Detector, Found
from winnow.learn.detection.drives import as_record, loss_of, precision, recall
from winnow.learn.progress import Log
from winnow.learn.pruners.fit import LEAST, MAX_SEED, Phase, Record, Run
from winnow.parts.learned import SHIPPED, learned
from winnow.world.streets import drive

SLUG = "toc3d"
DRIVES = 1600
APART = 1 << 32  # seeds of drives between two seeds of a run
KEPT = 0.3  # the share at which scores are measured


def load(weights: str | Path | None = None) -> Detector:
    """The detector with trained weights.

    Args:
        weights: a file that `winnow train toc3d` wrote, or `untrained`; default: those that winnow ships.
    """
    given = SHIPPED / f"{SLUG}.safetensors" if weights is None else weights
    module: Any = learned(SLUG, str(given), ModelInfo(), Detector)
    return module.eval()


def train(
    out: str | Path | None = None,
    *,
    resume: bool = False,
    seed: int = 0,
    scale: float = 1.0,
    save: int = 100,
    quiet: bool = False,
) -> Path:
    """Train the detector and its selectors, and return the file of the weights."""
    folder = Path(out) if out is not None else Path("runs") / SLUG
    if not scale > 0 or not 0 <= seed < MAX_SEED:
        raise WinnowError(f"scale {scale}, seed {seed}; scale is above 0, and seed is 0 … {MAX_SEED - 1}.")
    if (folder / "cache").exists() and not resume:
        raise WinnowError(f"{folder} already holds a run; continue it with resume, or choose another folder.")
    torch.set_num_threads(1)
    count = max(LEAST, round(DRIVES * scale))
    variant = {"method": SLUG, "model": "detector", "seed": seed, "scale": scale}
    (folder / "cache").mkdir(parents=True, exist_ok=True)

    def drives(start: int, end: int) -> Iterable[int]:
        return range(seed * APART + start, seed * APART + end)

    recipe: Any = Recipe(scale)
    run = Run(folder, recipe, variant, Log(folder, quiet), save, drives, torch.device("cpu"))
    records = run.recorded(count)
    given = {"seed": seed or None, "scale": None if scale == 1 else scale}
    command = f"winnow train {SLUG}" + "".join(f" --{k} {v}" for k, v in given.items() if v is not None)
    data = f"{count} drives of two moments of the train split from {seed * APART} on"
    facts = {"command": command, "name": "detector of winnow", "data": data}
    return run.export(run.trained(records), records, facts)


class Recipe:
    sizes = {"width": 64, "depth": 6, "heads": 4, "queries": 16}  # noqa: RUF012
    settings: dict[str, Any] = {}  # noqa: RUF012

    def __init__(self, scale: float) -> None:
        self.scale = scale

    def make(self) -> nn.Module:
        return Detector(**self.sizes)

    def record(self, number: int) -> Record:
        return as_record(drive(number, frames=2))

    def phases(self, records: Sequence[Record]) -> list[Phase]:
        told = {name: torch.stack([own[name] for own in records]) for name in records[0]}

        def plain(module: Any, batch: list[int]) -> Tensor:
            moments = [i % 2 for i in range(len(batch))]
            own = {name: x[batch, moments] for name, x in told.items() if name not in ("pose", "elapsed")}
            return loss_of(module(shown(own["images"]), ratios=None), own)

        def routed(module: Any, batch: list[int]) -> Tensor:
            own = {name: x[batch] for name, x in told.items()}
            generator = torch.Generator().manual_seed(batch[0] * len(records) + batch[1])
            both = followed(module, own, generator=generator)
            return sum((loss_of(found, at(own, moment)) for moment, found in enumerate(both)), torch.zeros(())) / 2

        return [
            Phase("detector", round(800 * self.scale), 8, 3e-3, plain),
            Phase("routing", round(250 * self.scale), 8, 1e-3, routed),
        ]

    @torch.no_grad()
    def measure(self, module: Any, records: Sequence[Record]) -> dict[str, float]:
        """Average precision, and how much of the objects the scores of each selector find."""
        own = {name: torch.stack([record[name] for record in records]) for name in records[0]}
        now = at(own, 1)
        first, second = followed(module, own)
        found = {
            "precision_plain": precision(module(shown(now["images"]), ratios=None), now["things"]).mean(),
            "precision": precision(second, now["things"]).mean(),
            "precision_without_history": precision(first, at(own, 0)["things"]).mean(),
        }
        for name, score in scores(module, own).items():
            found[f"recall_{name}"] = recall(score, now["inside"], KEPT).mean()
        return {name: float(value) for name, value in found.items()}


def shown(images: Tensor) -> Tensor:
    return images.float() / 255


def at(told: Record, moment: int) -> Record:
    """One moment of each drive."""
    return {name: x[:, moment] for name, x in told.items() if name not in ("pose", "elapsed")}


def followed(module: Detector, told: Record, *, shuffled: bool = False, **more: Any) -> tuple[Found, Found]:
    """Both moments of drives, the second with what was found in the first; or with that of the next drive."""
    first = module(shown(told["images"][:, 0]), **more)
    memory = module.memory(first, told["pose"][:, 0], told["elapsed"][:, 0])
    if shuffled:
        memory = type(memory)(**{name: x.roll(1, 0) for name, x in vars(memory).items()})
    return first, module(shown(told["images"][:, 1]), memory, **more)


@torch.no_grad()
def scores(module: Detector, told: Record) -> dict[str, Tensor]:
    """How the tokens of the second moments rank at the last selector: by history, and by what is to be worse."""
    _, second = followed(module, told)
    _, strange = followed(module, told, shuffled=True)
    alone = module(shown(told["images"][:, 1]))
    noise = torch.from_numpy(np.random.default_rng(0).random(second.scores[-1].shape[:2]))
    return {
        "history": second.scores[-1][..., 0],
        "history_first": second.scores[0][..., 0],
        "shuffled": strange.scores[-1][..., 0],
        "shuffled_first": strange.scores[0][..., 0],
        "by_token_first": alone.scores[0][..., 0],
        "norm": second.entering[-1].norm(dim=-1),
        "norm_first": second.entering[0].norm(dim=-1),
        "random": noise,
    }
