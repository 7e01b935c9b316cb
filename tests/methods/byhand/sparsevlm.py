"""What relevant words attend to in the layer before a cut; the best of the dropped, in clusters, behind the kept."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from byhand import Cut, Entry, Hand, Reference, Seen, share, top
from torch import Tensor

SETTINGS = {"counts": ("70%", "45%", "30%"), "layers": (1, 2, 3), "members": 2}


def raters_of(seen: Seen, entry: Entry) -> list[int]:
    """Rows of the words to which picture tokens are more alike than to the mean word."""
    picture = seen.hidden[0, torch.isin(seen.held, torch.cat(entry.content))]
    words = (seen.held > entry.items[-1][-1]).nonzero()[:, 0]
    alike = torch.stack([(x @ seen.hidden[0, words].T).softmax(0) for x in picture]).mean(0)
    return [int(w) for w, a in zip(words, alike, strict=True) if a > alike.mean()]


def clusters_of(x: Tensor, count: int) -> list[tuple[int, list[int]]]:
    """Density peaks: each centre with the tokens that are nearest to it, itself among them."""
    every = range(len(x))
    far = [[float((a - b).norm()) / x.shape[1] ** 0.5 for b in x] for a in x]
    density = [float(torch.tensor([-sum(d**2 for d in sorted(row)[:count]) / count]).exp()) for row in far]
    widest = max(max(row) for row in far)
    apart = [min([far[i][j] for j in every if density[j] > density[i]] or [widest]) for i in every]
    centres = sorted(every, key=lambda i: -apart[i] * density[i])[:count]
    joined: dict[int, list[int]] = {c: [c] for c in centres}
    for i in every:
        if i not in centres:
            joined[min(centres, key=lambda c: far[i][c])].append(i)
    return list(joined.items())


def by_hand(
    reference: Reference,
    sample: dict[str, Tensor],
    entry: Entry,
    *,
    counts: Sequence[int | str],
    layers: Sequence[int],
    members: int,
) -> Hand:

    def at(layer: int, keep: int | str) -> Cut:
        @torch.no_grad()
        def apply(seen: Sequence[Seen]) -> Seen:
            now, last = seen[-1], seen[layer - 1]
            if not entry.items:
                return now
            weights = reference.lm_attention(layer - 1, last, entry).mean(0)
            score = weights[_rows(last, seen[0], raters_of(seen[0], entry))].mean(0)
            rows, held = [], []
            for start, end, content in _parts(now, entry):
                if content is None:
                    rows.append(now.hidden[0, start:end])
                    held.append(now.held[start:end])
                    continue
                own = [i for i in range(start, end) if now.held[i] in content]
                total = min(len(own), share(keep, len(content), "down"))
                kept, others = _chosen(score[own], total, members)
                rows.append(now.hidden[0, [own[i] for i in kept]])
                held.append(now.held[[own[i] for i in kept]])
                x = now.hidden[0, [own[i] for i in others]]
                for centre, joined in clusters_of(x, total - len(kept)) if total < len(own) else ():
                    rows.append(x[joined].mean(0, keepdim=True))
                    held.append(now.held[[own[others[centre]]]])
            return Seen(torch.cat(rows)[None], torch.cat(held))

        return apply

    return Hand(entry, {layer: at(layer, keep) for layer, keep in zip(layers, counts, strict=True)})


def _rows(now: Seen, first: Seen, words: Sequence[int]) -> Tensor:
    """Where words stand now."""
    return torch.tensor([(now.held == first.held[w]).nonzero()[0, 0] for w in words])


def _parts(now: Seen, entry: Entry) -> list[tuple[int, int, Tensor | None]]:
    """Start and end of each stretch of rows; for a picture, the logical positions of its content."""
    parts: list[tuple[int, int, Tensor | None]] = []
    at = 0
    for item, content in zip(entry.items, entry.content, strict=True):
        inside = ((now.held >= item[0]) & (now.held <= item[-1])).nonzero()[:, 0]
        parts += [(at, int(inside[0]), None), (int(inside[0]), int(inside[-1]) + 1, content)]
        at = int(inside[-1]) + 1
    return [*parts, (at, len(now.held), None)]


def _chosen(score: Tensor, total: int, members: int) -> tuple[list[int], list[int]]:
    """Which are kept, and which of the others are merged, best first, so that kept and clusters are `total`."""
    n = len(score)
    ranked = sorted(range(n), key=lambda i: (-float(score[i]), i))
    for kept in range(total, 0, -1):
        merged = int((n - kept) * 0.3) + 1
        if total == n or kept + merged // members + 1 == total:
            break
    else:
        return top(score, total).tolist(), []
    return sorted(ranked[:kept]), ranked[kept : kept + merged]
