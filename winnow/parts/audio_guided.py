"""How many tokens of a video each window of time keeps, by what is heard in it (OmniZip, arXiv 2511.14582)."""

import torch
from jaxtyping import Float, Int
from torch import Tensor

from winnow.core.errors import WinnowError
from winnow.core.select import comparable, rank_of
from winnow.parts.per_tile import apportion


def heard_in(
    received: Float[Tensor, "b a"], times: Float[Tensor, "a 2"], windows: int, seconds: float, top: float
) -> Float[Tensor, "b w"]:
    """The share of the most attended tokens of a sound that lies in each window of time.

    Args:
        received: attention that each token of the sound receives in its encoder; NaN is the least.
        times: from when to when each of them lasts; it belongs to the window of its middle.
        windows: of the video; sound behind the last counts there.
        seconds: of a window.
        top: share of the tokens that are the most attended ones; at least one.
    """
    if windows < 1 or not seconds > 0 or not 0 < top <= 1:
        raise WinnowError(
            f"heard_in: windows={windows}, seconds={seconds}, top={top}; allowed: at least one window, "
            "of more than 0 s, and a share above 0 and up to 1."
        )
    count = max(1, round(top * received.shape[1]))
    best = (rank_of(comparable(received)) < count).to(torch.float32)
    window = (times.mean(1) / seconds).floor().long().clamp(0, windows - 1).to(received.device)
    return best.new_zeros(len(best), windows).scatter_add_(1, window.expand_as(received), best) / count


def guided_quotas(
    heard: Float[Tensor, "b w"], sizes: Int[Tensor, "b w"], total: int, low: float = 0.05, high: float = 1.0
) -> Int[Tensor, "b w"]:
    """Tokens that each window of a video keeps, `total` in all.

    A window's ratio is that of the whole, times the sum of a half and what is heard in it beside the mean, within
    bounds. The ratios are then scaled to the total, in which no window gets more than it has.

    Args:
        heard: as `heard_in` gives it. Where nothing is heard anywhere, all windows have one ratio.
        sizes: tokens of the video in each window.
    """
    if not 0 <= low <= high <= 1:
        raise WinnowError(f"guided_quotas: low={low}, high={high}; allowed: 0 ≤ low ≤ high ≤ 1.")
    mean = heard.mean(1, keepdim=True)
    beside = torch.where(mean > 0, heard / mean.clamp_min(torch.finfo(heard.dtype).tiny), 0.5)
    ratio = (total / sizes.sum(1, keepdim=True) * (0.5 + beside)).clamp(low, high)
    return apportion(total, ratio * sizes, sizes)
