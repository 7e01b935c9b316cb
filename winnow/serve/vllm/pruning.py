"""vLLM's own pruning of videos, the flag of which winnow borrows.

With it, vLLM's runners take positions from channels of the embeddings (`positions`). It is a rate of pruning; the least
one prunes nothing, but the texts that stand for videos are then written as for pruned ones.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from winnow.core.errors import UnsupportedError

LEAST = 1e-300  # 1 − this is 1


def borrow_flag(config: Any) -> None:
    """Set the flag where the runner of this machine knows it.

    Args:
        config: of what is multimodal, from vLLM.

    Raises:
        UnsupportedError: the operator prunes videos with it.
    """
    from vllm.platforms import current_platform

    if config.video_pruning_rate not in (None, 0, LEAST):
        raise UnsupportedError(
            "video_pruning_rate (EVS of vLLM) and winnow both change where tokens stand; leave one of them out."
        )
    if not current_platform.is_cpu():
        config.video_pruning_rate = LEAST


@contextmanager
def unpruned(info: Any) -> Iterator[None]:
    """Texts for videos as vLLM writes them without its own pruning."""
    config = info.ctx.get_mm_config()
    rate = config.video_pruning_rate
    if rate != LEAST:
        yield
        return
    config.video_pruning_rate = None
    try:
        yield
    finally:
        config.video_pruning_rate = rate
