"""A count that is learned by gradient (DiffRate): an expectation over candidates, taken as a whole number.

A mask over ranks goes forward as 0 and 1, and backward as the probability that a rank is kept, so that both a loss of
the model behind the mask and a price of the count reach the same logits. Only the training needs it: what it ends with
is a number.
"""

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

WHOLE = 1e-3  # what an expectation in fp32 may lie above a whole number that it is meant to be


class LearnedBudget(nn.Module):
    """How many of `total` tokens are kept: `total`, `total` − `step`, …, as many as stay above 0.

    Args:
        step: tokens between two candidates.
    """

    candidates: Tensor

    def __init__(self, total: int, step: int = 4) -> None:
        super().__init__()
        candidates = torch.arange(total, 0, -step)
        self.register_buffer("candidates", candidates.float(), persistent=False)
        self.logits = nn.Parameter(torch.zeros(len(candidates)))

    def expected(self) -> Float[Tensor, ""]:
        """The mean of the candidates."""
        return self.logits.softmax(0) @ self.candidates

    def count(self) -> Float[Tensor, ""]:
        """The expectation rounded up, with the gradient of the expectation."""
        expected = self.expected()
        return expected + ((expected - WHOLE).ceil() - expected).detach()

    def mask(self, rank: Int[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
        """1 where a rank (from 0) is below the count, else 0; the gradient is that of the probability to be kept."""
        chance = self.logits.softmax(0)
        survives = chance @ (self.candidates[:, None] > rank.flatten()).to(chance.dtype)
        hard = (rank.flatten() < self.count().detach()).to(chance.dtype)
        return (survives + (hard - survives).detach()).reshape(rank.shape)

    @torch.no_grad()
    def number(self) -> int:
        """The count, for good."""
        return int(self.count())


class Schedule(nn.ModuleDict):
    """Two learned counts for each block behind the first: patches left by pruning, and by merging.

    Args:
        patches: of a tile.
        blocks: of which the first takes nothing away.
    """

    def __init__(self, patches: int, blocks: int, step: int = 4) -> None:
        super().__init__({kind: _budgets(patches, blocks - 1, step) for kind in ("prune", "merge")})
        self.patches = patches

    def counts(self) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """What DiffRate is given: patches that each block in turn leaves when it has pruned, and when it has merged."""
        pruned, merged, left = [self.patches], [self.patches], self.patches
        for prune, merge in zip(self["prune"], self["merge"], strict=True):  # type: ignore[call-overload]
            pruned.append(min(left, prune.number()))
            merged.append(min(pruned[-1], merge.number()))
            left = merged[-1]
        return tuple(pruned), tuple(merged)


def _budgets(patches: int, count: int, step: int) -> nn.ModuleList:
    return nn.ModuleList(LearnedBudget(patches, step) for _ in range(count))
