"""Masks of a layer that holds other slots than were read: from the mask that the model made for all of them."""

from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor


def allowed(mask: Any) -> Tensor | None:
    """`[B, q, K]` True where a query reads a key; None where a mask says nothing."""
    if mask is None or mask.ndim == 2:
        return None
    seen = mask if mask.dtype == torch.bool else mask > torch.finfo(mask.dtype).min / 2
    return seen[:, 0]


def real_of(mask: Any, new: int) -> Bool[Tensor, "b n"] | None:
    """Which of the newest tokens are no padding; None where all are.

    The last row of a causal mask reads all that is real, also where that row itself is padding.
    """
    if mask is None:
        return None
    seen = mask[:, -new:].bool() if mask.ndim == 2 else allowed(mask)[:, -1, -new:]  # type: ignore[index]
    return None if bool(seen.all()) else seen.clone()  # not the whole mask with it


def mask_for(
    given: Any,
    new: int,
    held: int,
    real: Bool[Tensor, "b l"] | None,
    bias: Float[Tensor, "b g l"] | None,
    heads: int,
    dtype: torch.dtype,
) -> Any:
    """The mask over what a layer holds; None where nothing is hidden, so that fused attention stays on.

    Args:
        given: the model's own, over all tokens that were read: `[B, 1, q, K]` (booleans, or floats that are added),
            `[B, K]`, or None. What it says of the newest tokens holds; all that is left of earlier ones is read.
        new: the newest tokens.
        held: slots, the newest tokens included.
        real, bias: of the slots.
        heads: query heads.
        dtype: of the queries.
    """
    if given is None and real is None and bias is None:
        return None
    past = held - new
    if bias is None and (given is None or given.ndim == 2):
        if given is not None:  # flash attention: 2-D, and causal by itself
            own = torch.ones(given.shape[0], past, dtype=given.dtype, device=given.device)
            own = own if real is None else real[:, :past].to(given.dtype)
            whole = torch.cat([own, given[:, -new:]], 1)
            return None if bool(whole.all()) else whole
        if new == 1:
            return None if real is None else real[:, None, None]
    rows = next(x.shape[0] for x in (real, bias, given) if x is not None)
    device = next(x.device for x in (real, bias, given) if x is not None)
    if given is not None and given.ndim == 4:
        latest = given[..., -new:].expand(rows, -1, -1, -1)
    else:
        latest = torch.ones(new, new, dtype=torch.bool, device=device).tril()[None, None].expand(rows, 1, -1, -1)
        if given is not None:
            latest = latest & given[:, None, None, -new:].bool()
    before = torch.ones(rows, past, dtype=torch.bool, device=device) if real is None else real[:, :past]
    before = before[:, None, None].expand(-1, 1, latest.shape[2], -1)
    adds = bias is not None or latest.dtype != torch.bool
    if not adds:
        return torch.cat([before, latest], -1)
    low = torch.finfo(dtype).min
    parts = [x if x.dtype != torch.bool else torch.zeros(x.shape, dtype=dtype, device=device).masked_fill(~x, low)
             for x in (before, latest)]  # fmt: skip
    whole = torch.cat(parts, -1).to(dtype)
    if bias is not None:
        each = bias.repeat_interleave(heads // bias.shape[1], 1).to(dtype)
        whole = (whole + each[:, :, None]).clamp_min(low)
    return whole
