"""Ledger: what really happened to one request."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from winnow.core.layout import Layout
from winnow.core.reduction import Reduction


@dataclass
class ItemLedger:
    """One item of a request.

    Attributes:
        row: its sample in the batch.
        modality: image or video.
        layout: of its tokens as they stand in the LM's sequence.
        entry: content tokens at entry.
        reductions: (point, slug, map) in the order in which they were applied.
        ids: `[M]` content ids of what is left (a merged token: its anchor), on the device that made them.
    """

    row: int
    modality: str
    layout: Layout
    entry: int
    reductions: list[tuple[str, str, Reduction]] = field(default_factory=list)
    ids: Tensor | None = None

    @property
    def kept(self) -> Tensor:
        """Content ids of what is left after the last step, int64 on the CPU."""
        return self.ids.cpu()  # type: ignore[union-attr]

    def provenance(self) -> Reduction:
        """The composed map from what the first reduction saw to what is left, on the CPU."""
        total: Reduction | None = None
        for _, _, reduction in self.reductions:
            total = reduction if total is None else reduction @ total
        if total is None:
            return Reduction.select(self.kept, self.entry)
        return total


@dataclass
class Ledger:
    """Tokens at every point and layer, FLOPs, bytes and times of one request.

    Attributes:
        plan: key of the plan.
        positions: position policy.
        logical: real prompt tokens of each sample, as given.
        layer_tokens: by LM layer, the real tokens of each sample that it read in prefill.
        flops, flops_full: of the LM's prefill, analytic, and what they would be without compression.
        kv_bytes, kv_bytes_full: of the cache after prefill, and what it would hold without compression.
        times: milliseconds by phase, where timing was asked for.
        notes: what methods recorded (counts stay on the device until read).
    """

    plan: str
    positions: str
    logical: tuple[int, ...] = ()
    items: tuple[ItemLedger, ...] = ()
    layer_tokens: tuple[tuple[int, ...], ...] = ()
    flops: int = 0
    flops_full: int = 0
    kv_bytes: int = 0
    kv_bytes_full: int = 0
    times: dict[str, float] = field(default_factory=dict)
    notes: dict[str, Any] = field(default_factory=dict)

    @property
    def nan_scores(self) -> int:
        """Scores that were NaN and counted as −∞."""
        return int(self.notes.get("nan_scores", 0))

    @property
    def average_tokens(self) -> float:
        """Layer-averaged tokens of a sample: the x-axis of an honest comparison."""
        rows = [sum(layer) / len(layer) for layer in self.layer_tokens]
        return sum(rows) / len(rows) if rows else 0.0

    def __str__(self) -> str:
        kept = ", ".join(f"{len(i.ids)}/{i.entry}" for i in self.items if i.ids is not None) or "no items"
        share = f"{self.flops / self.flops_full:.0%}" if self.flops_full else "–"
        return (
            f"Ledger({self.plan}; content tokens {kept}; LM prefill FLOPs {share} of full; KV {self.kv_bytes:,} bytes)"
        )
