"""Heads of unequal length in one call of FlashAttention's kernel for sequences of unequal length.

Each lane (one head of one sample) is a sequence of its own, whose keys are read where they lie: nothing is padded, and
the room behind a lane is passed over.
"""

import functools
import inspect
from collections.abc import Callable
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

_WIDEST = 256
"""Channels of a head that the kernel takes, in steps of 8."""


@functools.cache
def kernel() -> Callable[..., Any] | None:
    """torch's own; None where it cannot pass over room (before torch 2.12)."""
    try:
        from torch.nn.attention.varlen import varlen_attn
    except ImportError:
        return None
    wanted = {"scale", "enable_gqa", "seqused_k"}
    return varlen_attn if wanted <= set(inspect.signature(varlen_attn).parameters) else None


def able(query: Float[Tensor, "b h 1 d"], values: Float[Tensor, "t e"]) -> bool:
    """Whether the kernel can do it: half precision, on a device that it is built for, and not while training."""
    width = query.shape[-1]
    return (
        query.is_cuda
        and kernel() is not None
        and query.dtype in (torch.float16, torch.bfloat16)
        and query.dtype == values.dtype
        and width == values.shape[-1] <= _WIDEST
        and width % 8 == 0
        and torch.cuda.get_device_capability(query.device)[0] >= 8
        and not (torch.is_grad_enabled() and query.requires_grad)
    )


def attend(
    query: Float[Tensor, "b h 1 d"],
    keys: Float[Tensor, "t d"],
    values: Float[Tensor, "t d"],
    bounds: Int[Tensor, " m"],
    lengths: Int[Tensor, " lanes"],
    longest: int,
    scaling: float,
) -> Float[Tensor, "b 1 h d"]:
    """Attention of one decoded token.

    Args:
        bounds: int32, one more than lanes: where each lane and its room begin, and the end.
        lengths: int32: slots of each lane.
    """
    b, h, _, d = query.shape
    lanes = lengths.shape[0]
    asked = query.reshape(lanes, b * h // lanes, d)  # the query heads that share a lane are heads of its one query
    each = torch.arange(lanes + 1, dtype=torch.int32, device=query.device)
    run = kernel()
    if run is None:
        raise RuntimeError("ask `able` first")
    out: Tensor = run(
        asked,
        keys[:, None],
        values[:, None],
        each,
        bounds,
        1,
        longest,
        scale=scaling,
        enable_gqa=True,
        seqused_k=lengths,
    )
    return out.reshape(b, h, 1, d).transpose(1, 2).contiguous()
