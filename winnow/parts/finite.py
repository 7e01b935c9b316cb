"""Tokens that are NaN or infinite anywhere, taken out of what is computed."""

import torch
from jaxtyping import Bool, Float
from torch import Tensor


def finite(tokens: Float[Tensor, "b n d"]) -> tuple[Float[Tensor, "b n d"], Bool[Tensor, "b n"]]:
    """The tokens, zeros for those that are broken, and which are not."""
    there = tokens.detach().sum(-1, dtype=torch.promote_types(tokens.dtype, torch.float32)).isfinite()
    return tokens.masked_fill(~there[..., None], 0), there


def finite_mean(tokens: Float[Tensor, "n d"]) -> Float[Tensor, "1 d"]:
    """The mean of those that are not broken, in single precision; zeros where all are."""
    left, there = finite(tokens[None])
    return left[0].float().sum(0, keepdim=True) / there.sum().clamp_min(1)
