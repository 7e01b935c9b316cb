"""What a map of tokens does to a sound: when its outputs are heard, and how much in a row is heard no more."""

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from winnow.core.layout import Layout
from winnow.core.reduction import Reduction


def times_of(reduction: Reduction, layout: Layout) -> Float[Tensor, " m"]:
    """The time of each output in seconds: the mean of the middles of its sources, by their weights.

    Args:
        reduction: of one sound, from all its content tokens.

    Raises:
        WinnowError: it is no sound.
    """
    middles = torch.from_numpy(layout.times.mean(1))
    weights = reduction.to_matrix(torch.float64).abs()
    return weights @ middles.to(weights.device) / weights.sum(-1)


def longest_dropped(reduction: Reduction, layout: Layout) -> float:
    """The longest span of a sound, in seconds, of which no token reaches any output; 0.0 where all do.

    What is merged reaches an output. Who writes speech down needs all of it: a long span is what a mean hides.

    Args:
        reduction: of one sound, from all its content tokens.

    Raises:
        WinnowError: it is no sound.
    """
    times, kept = layout.times, reduction.kept.cpu().numpy()
    edges = np.diff(np.concatenate([[True], kept, [True]]).astype(int))
    first, behind = np.flatnonzero(edges == -1), np.flatnonzero(edges == 1)
    return float(max((times[b - 1, 1] - times[a, 0] for a, b in zip(first, behind, strict=True)), default=0.0))
