"""A claim and what was measured of it; how claims about answers and about evidence are put."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Bool
from torch import Tensor

from tests.methods.directional import Gap, PerScene, Sample, at_random, gap
from winnow.core.method import Method
from winnow.core.view import View

Plans = Mapping[str, str | Method]  # two plans by what they are called, the one that is claimed to be better first


class Finding(NamedTuple):
    method: str
    claim: str
    difference: Gap
    measured: str

    @property
    def verdict(self) -> str:
        return "holds" if self.difference.low > 0 else "contradicted" if self.difference.high < 0 else "open"

    def line(self, twin: Finding | None = None) -> list[str]:
        """A row of the table; with the verdict on another model if there is one."""
        there = [] if twin is None else [f"{twin.verdict}, {twin.difference}"]
        return [self.method, self.claim, self.verdict, *there, f"{self.measured}; difference {self.difference}"]


def compared(
    method: str, claim: str, what: str, names: tuple[str, str], first: np.ndarray, second: np.ndarray
) -> Finding:
    """The claim that `first` is the larger."""
    shown = f"{what}: {names[0]} {first.mean():.3f}, {names[1]} {second.mean():.3f}"
    return Finding(method, claim, gap(first, second), shown)


def nearer(
    method: str, claim: str, what: str, names: tuple[str, str], first: np.ndarray, second: np.ndarray
) -> Finding:
    """The claim that `first` is the smaller."""
    shown = f"{what}: {names[0]} {first.mean():.3f}, {names[1]} {second.mean():.3f}"
    return Finding(method, claim, gap(second, first), shown)


def right(s: Sample, method: str, claim: str, what: str, plans: Plans) -> Finding:
    """The claim that the first plan answers more questions."""
    first, second = (s.right(plan) for plan in plans.values())
    return compared(method, claim, f"{what}, right", tuple(plans), first, second)  # type: ignore[arg-type]


def left(s: Sample, method: str, claim: str, what: str, plans: Plans) -> Finding:
    """The claim that the first plan leaves more of the evidence."""
    first, second = (s.left(plan) for plan in plans.values())
    return compared(method, claim, f"{what}, evidence left", tuple(plans), first, second)  # type: ignore[arg-type]


def gaps(s: Sample, kept: Bool[Tensor, "s v"]) -> PerScene:
    """The mean distance of a patch to the nearest that is kept, in patches."""
    place = torch.tensor(s.layout.place[s.layout.content][:, 2:]).double()
    apart = torch.cdist(place, place)
    return np.array([apart[:, own].amin(1).mean().item() for own in kept])


def touched(s: Sample, kept: Bool[Tensor, "s v"]) -> PerScene:
    """The share of things of which a token is kept."""
    return np.array([(masks & own).any(1).double().mean().item() for masks, own in zip(s.things, kept, strict=True)])


def as_many(s: Sample, kept: Bool[Tensor, "s v"]) -> Bool[Tensor, "s v"]:
    """For each scene as many tokens as were kept of it, at random."""
    lanes = [(view, lane) for view in s.views["projected"] for lane in range(view.b)]
    counts = kept.sum(1).tolist()
    return torch.stack([at_random(one(view, lane), k).kept[0] for (view, lane), k in zip(lanes, counts, strict=True)])


def one(view: View, lane: int) -> View:
    return View.of(view.tokens[lane : lane + 1], layout=view.layout)
