"""Votes of a window: what the last tokens attend to, pooled along the sequence."""

from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor

from winnow.core.errors import WinnowError
from winnow.core.kv import KVView
from winnow.core.kv_method import CacheMethod
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


class WindowVotes(CacheMethod):
    """What methods of the cache share that keep what the last tokens of a prompt attend to, and those tokens.

    A method that derives it has the settings `window`, `kernel` and `pool`, as `window_votes` takes them, and `limit`.
    """

    one_scale = True
    window: int
    kernel: int
    pool: Pool
    limit: int | None

    @property
    def recent(self) -> int:  # type: ignore[override]
        return self.window

    def check(self) -> None:
        """Refuse what leaves a window nothing to vote on, and pooling without a middle.

        Raises:
            WinnowError: which setting it is, and what is allowed.
        """
        if self.kernel % 2 == 0:
            raise WinnowError(f"{self.slug}: kernel={self.kernel}; allowed: an odd width, so that it has a middle.")
        if self.limit is not None and self.limit <= self.window:
            raise WinnowError(
                f"{self.slug}: limit={self.limit} leaves nothing beside the window of {self.window}; allowed: a limit "
                f"above {self.window}, or a smaller window."
            )

    def ends(self, view: KVView) -> tuple[int, int]:
        return 0, view.rows(self.window)

    def score(self, view: KVView) -> Float[Tensor, "b g n"]:
        return window_votes(view, self.window, self.kernel, self.pool)
