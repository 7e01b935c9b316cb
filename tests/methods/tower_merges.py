"""What tests of methods share that merge pairs of tokens in every block of a tower."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor

from tests.methods.directional import Sample, gap
from winnow.core.info import ModelInfo
from winnow.core.layout import Layout
from winnow.core.method import Method
from winnow.core.point import Point
from winnow.core.reduction import Reduction
from winnow.core.step import State, Step
from winnow.core.view import View
from winnow.signals.vision import VisionKeys


class Left(NamedTuple):
    """What is left behind a block: rows `[b, m, D]`, how many tokens each stands for, and its bias as a key."""

    x: Tensor
    size: Tensor
    bias: Tensor | None


def through(
    method: Method,
    info: ModelInfo,
    layout: Layout,
    x: Tensor,
    keys: Callable[[int], Tensor] | None = None,
    act: Callable[[View, State], Any] | None = None,
) -> list[Left]:
    """The steps of a method, one block after the other.

    Args:
        keys: of so many tokens; default: the tokens themselves.
        act: in the place of each step.
    """
    ids, state, found = torch.arange(layout.n).expand(len(x), -1), State(), []
    for step in method.bind(info)[1]:
        own = x if keys is None else keys(x.shape[1])
        view = View(x, layout, ids, layout.n_content, step.signals(lambda signal, own=own: own))
        action, state = (act or step.act)(view, state)
        feeds = (action.reduction.to_matrix() != 0).float()
        state = State(summed={name: (feeds @ s[..., None])[..., 0] for name, s in state.summed.items()})
        x, ids = action.reduction.apply(x), ids.gather(1, action.reduction.representatives)
        found.append(Left(x, state.summed.get("size", torch.ones(x.shape[:2])), action.log_bias))
    return found


def released(metric: Tensor, r: int, class_token: bool) -> list[list[int]]:
    """What the matching of ToMe's code does: tokens of the output as lists, its own token first."""
    unit = metric.double() / metric.double().norm(dim=-1, keepdim=True)
    even, odd = unit[::2], unit[1::2]
    scores = even @ odd.T
    if class_token:
        scores[0] = -torch.inf
    best, where = scores.max(-1)
    edge = sorted(range(len(best)), key=lambda a: -best[a].item())
    stays, merged = edge[r:], edge[:r]
    stays = sorted(stays) if class_token else stays
    return [[2 * a] for a in stays] + [
        [2 * b + 1, *(2 * a for a in sorted(merged) if int(where[a]) == b)] for b in range(len(odd))
    ]


@dataclass(frozen=True)
class Dropped(Method):
    """Drops r patches in every block, at random."""

    r: int = 0
    seed: int = 0

    slug: ClassVar[str] = "dropped"

    def steps(self, info: ModelInfo) -> tuple[Step, ...]:
        blocks = VisionKeys().block(info) + 1
        return tuple(Step(Point("blocks", block, "mlp"), partial(self._drop, block)) for block in range(blocks))

    def _drop(self, block: int, view: View, state: State) -> Reduction:
        generator = torch.Generator().manual_seed(97 * self.seed + block)
        patches = torch.rand(view.b, view.n - 1, generator=generator).argsort(1)[:, self.r :] + 1
        return Reduction.select(
            torch.cat([torch.zeros(view.b, 1, dtype=torch.int64), patches.sort(1).values], 1), view.n
        )


def check_answers_more_than_pruning(sample: Sample, method: Method) -> None:
    """With 40 tokens less in each of five blocks, 56 of 256 left."""
    assert gap(sample.right(method), sample.right(Dropped(40))).low > 0
