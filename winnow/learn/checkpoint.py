"""The files of a training run: the checkpoint from which it goes on, and its model as users load it."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from winnow.core.errors import WinnowError
from winnow.models.load import device_of

CHECKPOINT = "checkpoint.pt"


def check_start(folder: Path, *, resume: bool, device: str, seed: int, seeds: int, scale: float) -> None:
    """Refuse a run that cannot begin or go on.

    Args:
        seeds: how many there are.

    Raises:
        WinnowError: a seed or a scale out of bounds, no such device, or a folder with a run that is not to be resumed.
    """
    if not 0 < scale < math.inf:
        raise WinnowError(f"scale {scale}; it is the share of the full schedule, a number above 0")
    if not 0 <= seed < seeds:
        raise WinnowError(f"seed {seed} is outside 0 … {seeds - 1}")
    device_of(device)
    if (folder / CHECKPOINT).exists() and not resume:
        raise WinnowError(f"{folder} already holds a run; continue it with resume, or choose another folder")


def read_checkpoint(path: Path) -> dict[str, Any]:
    """What `write_checkpoint` wrote."""
    try:
        state: dict[str, Any] = torch.load(path, map_location="cpu", weights_only=True)
        state["variant"]
    except Exception:  # what a damaged file raises depends on where it is damaged
        raise WinnowError(f"{path} is not a whole checkpoint of a training run; begin a new one elsewhere") from None
    return state


def write_checkpoint(path: Path, state: Mapping[str, Any]) -> None:
    """Write a state whole or not at all; its `variant` says what must not change when the run goes on."""
    partial = path.with_suffix(".partial")
    torch.save(dict(state), partial)
    os.replace(partial, path)


def restore(
    module: nn.Module,
    weights: Mapping[str, Tensor],
    path: Path,
    *,
    of: str = "a model of other sizes; give those sizes",
) -> None:
    """Put the weights of the checkpoint at `path` into a module.

    Args:
        of: what they are of where they do not fit, and what to do.
    """
    try:
        module.load_state_dict(weights)
    except RuntimeError:
        raise WinnowError(f"{path} holds the weights of {of}") from None


def save_model(model: Any, copy: Any, processor: Any, folder: Path) -> None:
    """Save a model in bfloat16 with its processor or tokenizer, for `from_pretrained`.

    Args:
        copy: another model of these sizes, which is changed, so that the trained one is not.
    """
    copy.load_state_dict(model.state_dict())
    copy.bfloat16().save_pretrained(folder)
    processor.save_pretrained(folder)
