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

from collections.abc import Sequence
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor

from winnow.learn.detection.detector import Detector, Found
from winnow.learn.detection.drives import as_record, loss_of, precision, recall
from winnow.learn.fitting import Phase, Record
from winnow.learn.toy import Toy, stacked
from winnow.world.streets import drive

KEPT = 0.3  # the share at which scores are measured


class Driving(Toy[Detector]):
    slug, kind, name, model = "toc3d", "detector", "detector of winnow", Detector
    examples, told = 1600, "drives of two moments of the train split"
    sizes: ClassVar = {"width": 64, "depth": 6, "heads": 4, "queries": 16}

    def record(self, number: int) -> Record:
        return as_record(drive(number, frames=2))

    def phases(self, records: Sequence[Record]) -> list[Phase]:
        told = stacked(records)

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
        own = stacked(records)
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


load, train = Driving.load, Driving.train


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
