"""Strips of the sequence: quotas by their mean scores, and the best of each by attention and diversity."""

from __future__ import annotations

from collections.abc import Sequence

from byhand import Entry, Hand, Reference, Seen, cut, share, top
from torch import Tensor

from methods.byhand import cosines, feature_block

SETTINGS = {"keep": 9, "crops": 4, "diversity": 0.7}


def by_hand(
    reference: Reference, sample: dict[str, Tensor], entry: Entry, *, keep: int | str, crops: int, diversity: float
) -> Hand:
    vision = reference.vision(sample)
    block = feature_block(reference)

    def choose(number: int, rows: Tensor, seen: Sequence[Seen]) -> Tensor:
        n, k = len(rows), share(keep, len(rows), "down")
        source = vision.cls if vision.cls else vision.received
        attention = [1000 * a for a in source[block][number].mean(0)[entry.cells[number]].tolist()]
        alike = cosines(seen[-1].hidden[0, rows])
        c = min(n, crops)
        parts, start = [], 0
        for i in range(c):
            size = n // c + (i < n % c)
            parts.append(list(range(start, start + size)))
            start += size
        score = list(attention)
        for part in parts:
            variance = []
            for i in part:
                own = [0.0 if j == i else alike[i][j] for j in part]
                mean = sum(own) / max(1, len(part) - 1)
                variance.append(sum((s - mean) ** 2 for s in own) / max(1, len(part) - 1) if len(part) > 1 else 0.0)
            ratio = sum(attention[i] for i in part) / (sum(variance) + len(part) * 1e-6)
            for i, v in zip(part, variance, strict=True):
                score[i] += diversity * v * ratio
        means = [sum(score[i] for i in part) / len(part) for part in parts]
        shares = [mean / (sum(means) + 1e-6) * k for mean in means]
        quota = [int(s) for s in shares]
        for i in sorted(range(c), key=lambda i: -shares[i])[: k - sum(quota)]:
            quota[i] += 1
        kept: set[int] = set()
        for part, q in zip(parts, quota, strict=True):
            kept |= set(sorted(part, key=lambda i: -score[i])[:q])
        rest = [i for i in sorted(range(n), key=lambda i: -score[i]) if i not in kept]
        kept |= set(rest[: k - len(kept)])
        return rows[top(Tensor([i in kept for i in range(n)]), k)]

    return Hand(entry, {0: cut(entry, choose)})
