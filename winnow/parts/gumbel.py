"""Gumbel's noise, by which a softmax or a top-k becomes a draw."""

import torch
from torch import Tensor


def gumbel(like: Tensor, draws: torch.Generator) -> Tensor:
    """Noise of the shape of a tensor, without a gradient."""
    uniform = torch.rand(like.shape, generator=draws).clamp(1e-9, 1 - 1e-7)
    return -(-uniform.log()).log().to(like)
