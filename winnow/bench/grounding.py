"""How well moments are found in time, under compression or without: overlap, and how often it is enough."""

from __future__ import annotations

from collections.abc import Sequence

Span = tuple[float, float]


def overlap(found: Span | None, truth: Span) -> float:
    """Intersection over union of two moments (tIoU); 0 where nothing was found."""
    if found is None:
        return 0.0
    both = max(0.0, min(found[1], truth[1]) - max(found[0], truth[0]))
    either = (found[1] - found[0]) + (truth[1] - truth[0]) - both
    return both / either if either > 0 else float(found == truth)


def recall_at_1(found: Sequence[Span | None], truth: Sequence[Span], threshold: float = 0.5) -> float:
    """The share of the moments whose first answer overlaps at least as much (R@1)."""
    right = [overlap(one, own) >= threshold for one, own in zip(found, truth, strict=True)]
    return sum(right) / len(right)
