"""Pooling along the sequence: neighbours of a peak share its score."""

import torch.nn.functional as F
from torch import Tensor


def pooled_along(x: Tensor, kernel: int, pool: str) -> Tensor:
    """`[b, h, n]` pooled over neighbours along the sequence, its length unchanged.

    Args:
        kernel: neighbours and the slot itself; 1 leaves `x` as it is.
        pool: "mean" or "max".
    """
    if kernel < 2 or not x.shape[2]:
        return x
    pooling = F.avg_pool1d if pool == "mean" else F.max_pool1d
    return pooling(x, kernel, stride=1, padding=kernel // 2)[..., : x.shape[2]]
