"""Ledger: what really happened to one request."""

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from winnow.core.entered import Entered
from winnow.core.layout import Layout
from winnow.core.reduction import Reduction
from winnow.core.sampled import Sampled
from winnow.core.sounds import longest_dropped, times_of


@dataclass
class ItemLedger:
    """One item of a request.

    Attributes:
        row: its sample in the batch.
        modality: image, video or audio.
        layout: of its tokens as they stand in the LM's sequence.
        n_visual: content tokens as the encoder gave them.
        reductions: (point, slug, map) in the order in which they were applied; the first map takes the item's content
            tokens, each later one the rows of the one before.
        ids: `[M]` content ids of what is left (a merged token: its representative), on the device that made them.
        frames: of a video: how its frames were chosen, where the caller said it (`handle.using(videos=…)`).
        picture: of a picture: which it is and how it was cut and scaled, where the caller said it
            (`handle.using(prompt=…)`).
    """

    row: int
    modality: str
    layout: Layout
    n_visual: int
    reductions: list[tuple[str, str, Reduction]] = field(default_factory=list)
    ids: Tensor | None = None
    frames: Sampled | None = None
    picture: Entered | None = None

    @property
    def kept(self) -> Tensor:
        """Content ids of what is left after the last step, int64 on the CPU."""
        return self.ids.cpu()  # type: ignore[union-attr]

    def provenance(self) -> Reduction:
        """The composed map from the item's content tokens to what is left, on the CPU.

        An output that stands for no part of the picture ([CLS] alone) has no source.
        """
        total: Reduction | None = None
        for _, _, reduction in self.reductions:
            total = reduction if total is None else reduction @ total
        if total is None:
            return Reduction.select(self.kept, self.n_visual)
        return total.cpu()

    def times(self) -> Tensor:
        """`[M]` when each token of a sound that is left is heard, in seconds; a merged one at its sources' mean."""
        return times_of(self.provenance(), self.layout)

    def longest_dropped(self) -> float:
        """The longest span of a sound, in seconds, of which nothing is left."""
        return longest_dropped(self.provenance(), self.layout)

    def to_content(self, content: Tensor, layout: Layout) -> None:
        """Turn maps from the tower's tokens into maps from the content tokens of the LM's sequence.

        Args:
            content: `[n]` the content id of each token of the tower; −1 for those that are not there.
            layout: of the item in the LM's sequence.
        """
        self.layout = layout
        if not self.reductions:
            return
        point, slug, first = self.reductions[0]
        at = content[first.representatives].clamp_min(0)
        if first.matrix is not None:
            there = content >= 0
            columns = first.matrix.new_zeros(first.m, layout.n_content)
            columns = columns.index_add(1, content[there], first.matrix[:, there])
            moved = Reduction.mix(columns, representative=at, ordered=first.ordered)
        else:
            target = first.target
            if target is None:
                target = torch.arange(first.m, device=at.device)
            sources = content[first.index]
            moved = Reduction.edges(
                sources.clamp_min(0),
                torch.where(sources < 0, -1, target),
                first.weight,
                n=layout.n_content,
                m=first.m,
                representative=at,
                ordered=first.ordered,
            )
        self.reductions[0] = (point, slug, moved)


@dataclass
class Ledger:
    """Tokens at every point and layer, FLOPs, bytes and times of one request.

    Attributes:
        plan: key of the plan.
        resolved: the plan with the settings that this model made definite.
        positions: position policy.
        adapter: of the model's class: its own, or `generic`.
        logical: real prompt tokens of each sample, as given.
        layer_tokens: by LM layer, the real tokens of each sample that it read in prefill.
        flops, flops_full: of the LM's prefill, analytic, and what they would be without compression.
        kv_bytes, kv_bytes_full: of the cache after prefill, and what it would hold without compression.
        kv_slots: by LM layer, the slots that its cache held after prefill, of all samples and heads; None for a layer
            whose cache is the model's own, and empty where the plan leaves the cache alone.
        times: milliseconds by phase, where timing was asked for.
        notes: what methods recorded (counts stay on the device until read).
    """

    plan: str
    positions: str
    resolved: str = ""
    adapter: str = ""
    logical: tuple[int, ...] = ()
    items: tuple[ItemLedger, ...] = ()
    layer_tokens: tuple[tuple[int, ...], ...] = ()
    flops: int = 0
    flops_full: int = 0
    kv_bytes: int = 0
    kv_bytes_full: int = 0
    kv_slots: tuple[int | None, ...] = ()
    times: dict[str, float] = field(default_factory=dict)
    notes: dict[str, Any] = field(default_factory=dict)

    @property
    def nan_scores(self) -> int:
        """Scores that were NaN and counted as −∞."""
        return int(self.notes.get("nan_scores", 0))

    @property
    def read_in_full(self) -> str | None:
        """Why nothing could be compressed (no picture, or none that the engine could see); None if items were there."""
        return self.notes.get("read_in_full")

    @property
    def selection(self) -> str | None:
        """In a later turn of a conversation, for which question the tokens were selected; None in the first."""
        return self.notes.get("selection")

    @property
    def average_tokens(self) -> float:
        """Layer-averaged tokens of a sample: the x-axis of an honest comparison."""
        rows = [sum(layer) / len(layer) for layer in self.layer_tokens]
        return sum(rows) / len(rows) if rows else 0.0

    def __str__(self) -> str:
        kept = ", ".join(f"{len(i.ids)}/{i.n_visual}" for i in self.items if i.ids is not None) or (
            f"none ({self.read_in_full})" if self.read_in_full else "none"
        )
        share = f"{self.flops / self.flops_full:.0%}" if self.flops_full else "–"
        how = "; generic adapter" if self.adapter == "generic" else ""
        return (
            f"Ledger({self.plan}; content tokens {kept}; LM prefill FLOPs {share} of full; "
            f"KV {self.kv_bytes:,} bytes{how})"
        )


def add_notes(known: dict[str, Any], notes: dict[str, Any]) -> None:
    """Take what a step recorded: counts add up, anything else replaces what was there."""
    for name, value in notes.items():
        old = known.get(name)
        adds = old is not None and isinstance(value, int | Tensor) and not isinstance(value, bool)
        known[name] = old + value if adds else value
