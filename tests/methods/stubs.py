"""What tests of methods share: selections that look at nothing, and checks of cuts that keep the largest values."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence

import torch

from winnow.core.info import ModelInfo
from winnow.core.layout import Layout
from winnow.core.method import Method
from winnow.core.reduction import Reduction
from winnow.core.step import State
from winnow.core.view import View
from winnow.testing import Picture


def first_k(view: View, k: int) -> Reduction:
    """The first k tokens."""
    return Reduction.select(torch.arange(k).expand(view.b, k), view.n)


def uniform(view: View, k: int) -> Reduction:
    """k evenly spaced tokens."""
    return Reduction.select((torch.arange(k) * view.n // k).expand(view.b, k), view.n)


STUBS = (first_k, uniform)
Choice = Callable[[View, int], Reduction]


def ids(reduction: Reduction, lane: int = 0) -> list[int]:
    """The tokens that a selection keeps of one item."""
    return reduction.lane(lane).index.tolist()


def scores(seed: int, n: int, b: int = 1) -> torch.Tensor:
    """Distinct positive scores `[b, n]`."""
    return torch.rand(b, n, generator=torch.Generator().manual_seed(seed))


def tokens(seed: int, n: int, d: int = 16, b: int = 1) -> torch.Tensor:
    return torch.randn(b, n, d, generator=torch.Generator().manual_seed(seed))


def chain(method: Method, seen: dict[int, torch.Tensor], info: ModelInfo) -> dict[int, torch.Tensor]:
    """Ids `[b, m]` that are left before each layer at which a method cuts.

    Args:
        seen: `[b, n]` what each layer shows of a token; a step reads one signal, of one layer.
    """
    b, n = next(iter(seen.values())).shape
    held, found = torch.arange(n).expand(b, n), {}
    for step in method.bind(info)[1]:
        (signal,) = step.needs
        values = {signal: seen[signal.layer].gather(1, held)}
        view = View(tokens(0, held.shape[1], 2, b), Layout.grid(1, n), held, n, values)
        held = held.gather(1, step.act(view, State())[0].reduction.index)
        found[step.at.index] = held
    return found


def check_keeps_largest(choose: Choice, counts: Sequence[int] = (9, 15)) -> None:
    """Kept are the tokens with the largest values, in the order of the picture."""
    for seed, k in itertools.product(range(5), counts):
        row = scores(seed, 30)
        assert ids(choose(View.of(tokens(0, 30), row), k)) == row[0].topk(k).indices.sort().values.tolist()


def check_ties_and_broken_values(choose: Choice, broken: tuple[float, float] = (torch.nan, torch.inf)) -> None:
    """Of equal tokens the first stay; two that are broken go first."""
    flat = torch.ones(1, 8)
    assert ids(choose(View.of(tokens(0, 8), flat), 4)) == [0, 1, 2, 3]
    flat[0, [0, 2]] = torch.tensor(broken)
    view = View.of(tokens(0, 8), flat)
    assert ids(choose(view, 4)) == [1, 3, 4, 5]
    assert int(view.notes["nan_scores"]) == 2


def check_tiles_are_one_pool(choose: Choice) -> None:
    """All that is kept may be of one tile."""
    layout, row = Picture.tiled(4, 2, 1).lm, torch.zeros(1, 48)
    row[0, 16:28] = 1
    assert ids(choose(View.of(tokens(0, 48), row, layout=layout), 12)) == [*range(16, 28)]
