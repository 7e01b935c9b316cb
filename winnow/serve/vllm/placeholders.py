"""What stands for a picture or a video in a prompt of vLLM: runs of placeholders, with text of the model between."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import groupby
from typing import Any

import torch
from torch import Tensor

from winnow.core.errors import WinnowError


def runs_of(content: Any) -> tuple[int, ...]:
    """The lengths of the unbroken runs of placeholders in what stands for a picture."""
    return tuple(len(list(run)) for placeholder, run in groupby(_mask(content)) if placeholder)


def shortened(content: Any, kept: Sequence[int]) -> Any:
    """What stands for a picture, with only `kept` placeholders of each run."""
    from vllm.multimodal.processing import PromptUpdateDetails

    tokens: list[int] = []
    mask: list[bool] = []
    left = iter(kept)
    pairs = zip(content.full, _mask(content), strict=True)
    for placeholder, run in groupby(pairs, key=lambda pair: pair[1]):
        own = [token for token, _ in run]
        own = own[: next(left)] if placeholder else own
        tokens += own
        mask += [placeholder] * len(own)
    if content.is_embed is None:
        return PromptUpdateDetails(full=tokens)
    return PromptUpdateDetails(full=tokens, is_embed=FixedMask(tuple(mask)))


def marks_of(content: Any) -> tuple[tuple[int, ...], ...]:
    """The token ids before each run of placeholders and behind the last; empty where there are none."""
    marks: list[list[int]] = [[]]
    pairs = zip(content.full, _mask(content), strict=True)
    for placeholder, run in groupby(pairs, key=lambda pair: pair[1]):
        if placeholder:
            marks.append([])
        else:
            marks[-1] = [token for token, _ in run]
    return tuple(map(tuple, marks)) if any(marks) else ()


def held(content: Any, kept: int) -> Any:
    """Placeholders for all that stands for a video: the text of its frames, and `kept` tokens of them."""
    from vllm.multimodal.processing import PromptUpdateDetails

    mask = _mask(content)
    return PromptUpdateDetails(full=[content.full[mask.index(True)]] * (mask.count(False) + kept))


class FixedMask:
    """Which tokens are placeholders. A class, because vLLM's caches pickle it."""

    def __init__(self, mask: tuple[bool, ...]) -> None:
        self.mask = mask

    def __call__(self, full: list[int]) -> Tensor:
        if len(full) != len(self.mask):
            raise WinnowError(f"vLLM asks for a mask of {len(full)} tokens, of which winnow knows {len(self.mask)}.")
        return torch.tensor(self.mask)


def _mask(content: Any) -> list[bool]:
    return [True] * len(content.full) if content.is_embed is None else content.is_embed(content.full).tolist()
