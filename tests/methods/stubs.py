"""What the tests of a method must tell it from: selections that look at nothing."""

from __future__ import annotations

import torch

from winnow.core.reduction import Reduction
from winnow.core.view import View


def first_k(view: View, k: int) -> Reduction:
    """The first k tokens."""
    return Reduction.select(torch.arange(k).expand(view.b, k), view.n)


def uniform(view: View, k: int) -> Reduction:
    """k evenly spaced tokens."""
    return Reduction.select((torch.arange(k) * view.n // k).expand(view.b, k), view.n)


STUBS = (first_k, uniform)


def ids(reduction: Reduction, lane: int = 0) -> list[int]:
    """The tokens that a selection keeps of one item."""
    return reduction.lane(lane).index.tolist()


def scores(seed: int, n: int, b: int = 1) -> torch.Tensor:
    """Distinct positive scores `[b, n]`."""
    return torch.rand(b, n, generator=torch.Generator().manual_seed(seed))


def tokens(seed: int, n: int, d: int = 16, b: int = 1) -> torch.Tensor:
    return torch.randn(b, n, d, generator=torch.Generator().manual_seed(seed))
