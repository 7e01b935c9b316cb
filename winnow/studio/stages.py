"""What became of a picture's tokens, step by step, as the page draws it."""

from __future__ import annotations

import re
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool

from winnow.core.ledger import ItemLedger
from winnow.core.reduction import Reduction

DROPPED = -1
_LAYER = re.compile(r"layers\[(\d+)\]")


def stages(item: ItemLedger, matters: Bool[np.ndarray, " v"] | None) -> list[dict[str, Any]]:
    """The picture as it was encoded, and what each step left of it.

    Args:
        matters: which content tokens lie on the evidence; None: the evidence is not known.

    Returns:
        For each stage its `point` and `method` (empty for the first), `left` rows, `kept` (content tokens that stand
        for a row), `owner` (for each content token the kept one whose row it reached with the largest weight, or −1),
        and `recall`, the share of the evidence that is kept.
    """
    n = item.layout.n_content
    total = Reduction.select(torch.arange(n), n)
    found = [_stage("", "", total, matters)]
    for point, slug, reduction in item.reductions:
        total = reduction.cpu() @ total
        found.append(_stage(str(point), slug, total, matters))
    return found


def at_layers(item: ItemLedger, depth: int) -> list[int]:
    """For each layer of the language model, which of `stages` it reads."""
    starts = [int(layer[1]) if (layer := _LAYER.fullmatch(str(point))) else 0 for point, _, _ in item.reductions]
    return [sum(start <= layer for start in starts) for layer in range(depth)]


def _stage(point: str, slug: str, total: Reduction, matters: np.ndarray | None) -> dict[str, Any]:
    sourced = total.sourced
    kept = np.unique(total.representatives[sourced].numpy())
    recall = None if matters is None else float(matters[kept].sum() / max(1, matters.sum()))
    return {
        "point": point,
        "method": slug,
        "left": total.m,
        "kept": kept.tolist(),
        "owner": _owners(total).tolist(),
        "recall": recall,
    }


def _owners(total: Reduction) -> torch.Tensor:
    """`[n]` of each source the representative of the output that it feeds most; itself, where it represents one."""
    if total.is_selection:
        owner = torch.full((total.n,), DROPPED)
        owner[total.representatives] = total.representatives
        return owner
    heaviest = total.to_matrix().abs().argmax(0)
    owner = torch.where(total.kept, total.representatives[heaviest], DROPPED)
    own = total.representatives[total.sourced]
    owner[own] = own
    return owner
