"""Selection by score: the same tokens on every device, whatever the ties and the broken values."""

import torch
from jaxtyping import Float, Int, Num
from torch import Tensor

from winnow.core.reduction import Reduction
from winnow.core.view import View


def count_broken(broken: Tensor, view: View | None) -> None:
    """Add the number of broken values to `view.notes["nan_scores"]`, which stays on the device."""
    if view is not None:
        view.notes["nan_scores"] = broken.sum() + view.notes.get("nan_scores", 0)


def comparable(scores: Num[Tensor, "b n"], view: View | None = None) -> Float[Tensor, "b n"]:
    """Scores that can be sorted: at least fp32, and NaN, which sorts above everything, as −inf (counted)."""
    scores = scores.to(torch.promote_types(scores.dtype, torch.float32))
    broken = scores.isnan()
    count_broken(broken, view)
    return scores.masked_fill(broken, -torch.inf)


def ranked(scores: Float[Tensor, "b n"]) -> Int[Tensor, "b n"]:
    """Indices from the best score to the worst; among equals the lowest index is first. Takes comparable scores."""
    return torch.sort(scores, dim=-1, descending=True, stable=True).indices


def rank_of(scores: Float[Tensor, "b n"]) -> Int[Tensor, "b n"]:
    """The rank of each token: 0 is the best score, ties by index. Takes comparable scores."""
    return places(ranked(scores))


def places(order: Int[Tensor, "b n"]) -> Int[Tensor, "b n"]:
    """Where each index stands in an order of all of them."""
    return torch.empty_like(order).scatter_(
        1, order, torch.arange(order.shape[1], device=order.device).expand_as(order)
    )


def top_k(scores: Num[Tensor, "b n"], k: int, view: View | None = None) -> Reduction:
    """Keep the k tokens with the highest scores (all, if there are fewer), in the order in which they stand.

    Ties go to the lowest index; a NaN is never kept while anything else remains. No host read.
    """
    chosen = ranked(comparable(scores, view))[:, :k].sort(dim=-1).values
    return Reduction.select(chosen, scores.shape[-1])
