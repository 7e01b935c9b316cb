"""The map of several sequences laid one behind the other, from the map of each."""

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from winnow.core.reduction import Reduction


def side_by_side(parts: Sequence[Reduction]) -> Reduction:
    """One map from all sources of the parts, in order, to all their outputs; no part has lanes or padding."""
    if len(parts) == 1:
        return parts[0]
    sources = _starts([part.n for part in parts])
    ordered = all(part.ordered for part in parts)
    n, m = sum(part.n for part in parts), sum(part.m for part in parts)
    representative = torch.cat([part.representatives + at for part, at in zip(parts, sources, strict=True)])
    if all(part.is_selection for part in parts):
        return Reduction(n, m, representative, ordered=ordered)
    if any(part.matrix is not None for part in parts):
        matrix = torch.block_diag(*[part.to_matrix() for part in parts])
        return Reduction.mix(matrix, representative=representative, ordered=ordered)
    edges = [_edges(part, a, b) for part, a, b in zip(parts, sources, _starts([p.m for p in parts]), strict=True)]
    index, target, weight = (torch.cat(column) for column in zip(*edges, strict=True))
    return replace(Reduction.edges(index, target, weight, n=n, m=m, ordered=ordered), representative=representative)


def _starts(sizes: list[int]) -> list[int]:
    return [sum(sizes[:i]) for i in range(len(sizes))]


def _edges(part: Reduction, source: int, output: int) -> tuple[Tensor, Tensor, Tensor]:
    """Sources, targets and weights of a sparse map, moved to where its part begins."""
    index: Tensor = part.index  # type: ignore[assignment]
    target = torch.arange(part.m, device=index.device) if part.target is None else part.target
    weight = torch.ones(index.shape, device=index.device) if part.weight is None else part.weight
    return index + source, torch.where(target < 0, target, target + output), weight
