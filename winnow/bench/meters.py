"""Meters: what is read off answers and ledgers."""

from __future__ import annotations

import functools
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from winnow.bench.tasks import Boxes
from winnow.core.layout import Layout
from winnow.core.ledger import ItemLedger, Ledger
from winnow.core.point import Point
from winnow.core.reduction import Reduction
from winnow.engine.flops import kv_bytes_per_token, lm_flops

REFUSAL = re.compile(r"^(i('m| am)? (sorry|cannot|can't|can not|unable|not able)|unanswerable|as an ai)\b")


def normal(text: str) -> str:
    """Case, outer punctuation and repeated blanks are ignored."""
    return " ".join(text.casefold().split()).strip(" .,;:!?\"'")


def judge(answer: str, truth: str, *, cut: bool = False) -> tuple[bool, str]:
    """Whether an answer is right, and its status: `ok`, or why it is counted apart (and as wrong).

    Args:
        cut: the answer had not ended when it reached the limit.
    """
    said = normal(answer)
    if not said:
        return False, "empty"
    if cut:
        return False, "long"
    if said == normal(truth):
        return True, "ok"
    if said in ("none", "null", "nan"):
        return False, "none"
    return False, "refusal" if REFUSAL.match(said) else "ok"


def evidence_recall(read: Sequence[np.ndarray], layout: Layout, evidence: Boxes) -> float | None:
    """Share of the evidence's tokens that a layer of the LM reads, mean over layers; None where there is no evidence.

    For a method that acts before the LM this is the share that it keeps. A token that was merged into another is not
    read; the one that it was merged into is.

    Args:
        read: from `read_by_layer`.
    """
    matters = _matters(layout, evidence)
    if not matters.any():
        return None
    return float(np.mean([matters[ids[ids >= 0]].sum() for ids in read]) / matters.sum())


def read_by_layer(item: ItemLedger, depth: int) -> list[np.ndarray]:
    """For each LM layer, the content ids that it reads of an item (a merged token: its representative; [CLS]: −1).

    Args:
        depth: LM layers.
    """
    total: Reduction | None = None
    found: list[np.ndarray] = []

    def read() -> np.ndarray:
        if total is None:
            return np.arange(item.n_visual)
        return np.where(total.sourced, total.representatives, -1)

    for text, _, reduction in item.reductions:
        point = Point.of(text)
        if point.name == "layers" and point.index > len(found):  # type: ignore[operator]
            found += [read()] * (point.index - len(found))  # type: ignore[operator]
        total = reduction.cpu() if total is None else reduction.cpu() @ total
    return found + [read()] * (depth - len(found))


@functools.lru_cache(maxsize=4096)  # every plan is asked about the same evidence
def _matters(layout: Layout, evidence: Boxes) -> np.ndarray:
    return layout.covering(evidence)


@dataclass(frozen=True)
class Cost:
    """What one sample of a request cost: content tokens left, tokens that a layer reads, FLOPs and bytes."""

    kept: int
    layer_tokens: float
    flops: int
    flops_full: int
    kv_bytes: int
    kv_bytes_full: int


def costs(ledger: Ledger, config: Any, itemsize: int) -> list[Cost]:
    """The cost of each sample alone, independent of its batch.

    Args:
        config: of the language model.
        itemsize: bytes of one number in the cache.
    """
    each = kv_bytes_per_token(config, itemsize)
    kept = [0] * len(ledger.logical)
    for item in ledger.items:
        kept[item.row] += len(item.kept)

    @functools.cache  # samples of a batch are often of one length
    def flops(tokens: tuple[int, ...]) -> int:
        return lm_flops(config, [[n] for n in tokens])

    found = []
    for row, whole in enumerate(ledger.logical):
        tokens = tuple(layer[row] for layer in ledger.layer_tokens)
        full = (whole,) * len(tokens)
        found.append(
            Cost(
                kept=kept[row],
                layer_tokens=sum(tokens) / len(tokens),
                flops=flops(tokens),
                flops_full=flops(full),
                kv_bytes=each * sum(tokens),
                kv_bytes_full=each * sum(full),
            )
        )
    return found


def merged_into(item: ItemLedger) -> tuple[tuple[int, ...], dict[int, tuple[int, ...]] | None]:
    """Content ids that are left of an item, and for each those that feed it; None where every one is a copy."""
    total = item.provenance()
    sourced = total.sourced
    representatives = tuple(total.representatives[sourced].tolist())
    if total.is_selection:
        return representatives, None
    used = total.to_matrix()[sourced] != 0
    found = {
        representative: tuple(row.nonzero()[:, 0].tolist())
        for representative, row in zip(representatives, used, strict=True)
    }
    return representatives, None if all(
        sources == (representative,) for representative, sources in found.items()
    ) else found


def counted_flops(run: Callable[[], object], module: str = "") -> int:
    """FLOPs that torch counts while `run` runs, in the convention of `winnow.engine.flops` (attention is full N²).

    torch's counter does not know the CPU's fused attention, so a formula for it is registered here.

    Args:
        module: count inside this submodule only, by its name in the model (`model.language_model`); default: all.
    """
    from torch.utils.flop_counter import FlopCounterMode

    fused = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
    with FlopCounterMode(display=False, custom_mapping={fused: _attention_flops}) as counter:
        run()
    if not module:
        return counter.get_total_flops()
    found = [ops for name, ops in counter.get_flop_counts().items() if name.partition(".")[2] == module]
    if len(found) != 1:
        raise ValueError(f"the counter saw {len(found)} modules of the name {module!r}")
    return sum(found[0].values())


def _attention_flops(query: Sequence[int], key: Sequence[int], value: Sequence[int], *_: Any, **__: Any) -> int:
    """Of two products, queries with keys and weights with values; shapes are `[B, H, N, D]`."""
    b, h, n, d = query
    return 2 * b * h * n * key[-2] * d + 2 * b * h * n * key[-2] * value[-1]
