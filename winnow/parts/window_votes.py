"""Votes of a window: what the last tokens attend to, pooled along the sequence."""

from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor

from winnow.core.errors import WinnowError
from winnow.core.kv import KVView
from winnow.parts.pooling import pooled_along

Pool = Literal["mean", "max"]


def window_votes(view: KVView, window: int, kernel: int, pool: Pool) -> Float[Tensor, "b g n"]:
    """The mean attention of the last `window` queries to each slot, and over the query heads of each KV head.

    Slots before the window are pooled among themselves; those of the window have what they got.
    """
    w = view.rows(window)
    votes = view.attention(w).mean(2)
    before = pooled_along(votes[..., : view.n - w], kernel, pool)
    return view.per_kv_head(torch.cat([before, votes[..., view.n - w :]], -1))


def check_window(method: str, window: int, kernel: int, limit: int | None) -> None:
    """Refuse what leaves a window nothing to vote on, and pooling without a middle.

    Raises:
        WinnowError: which setting it is, and what is allowed.
    """
    if kernel % 2 == 0:
        raise WinnowError(f"{method}: kernel={kernel}; allowed: an odd width, so that it has a middle.")
    if limit is not None and limit <= window:
        raise WinnowError(
            f"{method}: limit={limit} leaves nothing beside the window of {window}; allowed: a limit above {window}, "
            "or a smaller window."
        )
