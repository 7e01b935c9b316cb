"""Static places merged over windows of frames, the others ranked by the tower; in the LM, the lower half merged."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import zoo
from byhand import Entry, Hand, Reference, Seen, share, top
from torch import Tensor, cosine_similarity

from methods.byhand import feature_block, frames_of

SETTINGS = {"keep": "40%", "tau": 0.8, "layer": 2, "inner": "50%"}
BUILDS = (*zoo.BUILDS, "llava_next_video")
ROWS = {
    "qwen2_5_vl": ("3 W 6", "9", "2 X 4 W 5", "4 A 2"),
    "llava_next_video": ("3 W 6", "9", "2 W 4 W 5"),
}
CENTRE, NEAR = 0.6, 7

Made = list[tuple[int, Tensor, int]]
"""Outputs: the token that each stands for, its row, and how many tokens are in it."""


def by_hand(
    reference: Reference, sample: dict[str, Tensor], entry: Entry, *, keep: str, tau: float, layer: int, inner: str
) -> Hand:
    vision, block = reference.vision(sample), feature_block(reference)
    sizes: dict[int, Tensor] = {}

    def before(seen: Sequence[Seen]) -> Seen:
        now = seen[-1]
        hidden, stay = now.hidden.clone(), torch.ones(len(now.held), dtype=torch.bool)
        for number, content in enumerate(entry.content):
            score = vision.received[block][number].mean(0)[entry.cells[number]]
            frames = frames_of(sample, entry, number)[0]
            made = shortened(now.hidden[0, content], score, frames, share(keep, len(content), "even"), tau)
            stay[content] = False
            for place, row, _ in made:
                hidden[0, content[place]] = row
                stay[content[place]] = True
            sizes[number] = torch.tensor([float(size) for _, _, size in sorted(made, key=lambda one: one[0])])
        return Seen(hidden[:, stay], now.held[stay])

    def inside(seen: Sequence[Seen]) -> Seen:
        now, last = seen[-1], seen[layer - 1]
        hidden, stay = now.hidden.clone(), torch.ones(len(now.held), dtype=torch.bool)
        attention = reference.lm_attention(layer - 1, last, entry)[:, -1].mean(0)
        for number, content in enumerate(entry.content):
            rows = torch.isin(now.held, content).nonzero()[:, 0]
            kept = top(attention[rows], share(inner, len(rows), "even")).tolist()
            x, size = now.hidden[0, rows], sizes[number]
            groups = {i: [i] for i in kept}
            for i in sorted(set(range(len(rows))) - set(kept)):
                groups[max(kept, key=lambda j, i=i: float(cosine_similarity(x[i], x[j], dim=0)))].append(i)
            stay[rows] = False
            for i, own in groups.items():
                hidden[0, rows[i]] = (x[own] * size[own, None]).sum(0) / size[own].sum()
                stay[rows[i]] = True
        return Seen(hidden[:, stay], now.held[stay])

    return Hand(entry, {0: before, layer: inside})


def shortened(x: Tensor, score: Tensor, frames: int, keep: int, tau: float) -> Made:
    """What becomes of the tokens of an item, `[frames · places, D]`."""
    if frames == 1:
        return [(int(i), x[i], 1) for i in top(score, keep)]
    video, places = x.unflatten(0, (frames, -1)), len(x) // frames
    same = [
        [float(cosine_similarity(video[t, p], video[t + 1, p], dim=0)) > tau for p in range(places)]
        for t in range(frames - 1)
    ]
    groups: list[tuple[list[int], list[int]]] = []  # frames and places
    for first, last in windows(same):
        static = [p for p in range(places) if first < last and all(same[t][p] for t in range(first, last))]
        groups += [(list(range(first, last + 1)), static)] if static else []
        groups += [([t], [p for p in range(places) if p not in static]) for t in range(first, last + 1)]
    total, done, made = sum(len(own) for _, own in groups), 0, []
    for times, own in groups:
        count = min(keep, total) * (done + len(own)) // total - min(keep, total) * done // total
        done += len(own)
        if len(times) == 1:
            chosen = [own[int(i)] for i in top(score[[times[0] * places + p for p in own]], count)] if own else []
            made += [(times[0] * places + p, video[times[0], p], 1) for p in chosen]
        else:
            means = video[times][:, own].mean(0)
            for peak, others in clusters(means, count):
                row = CENTRE * means[peak] + (1 - CENTRE) * means[others].mean(0) if others else means[peak]
                made.append((times[0] * places + own[peak], row, len(times) * (1 + len(others))))
    return made


def windows(same: list[list[bool]]) -> list[tuple[int, int]]:
    """The first and last frames of the windows that save most; among equals of the last frames, short ones."""
    best: list[tuple[int, list[tuple[int, int]]]] = [(0, [])]
    for end in range(len(same) + 1):
        found = []
        for start in range(end, -1, -1):
            held = sum(all(same[t][p] for t in range(start, end)) for p in range(len(same[0])))
            saved, before = best[start]
            found.append((saved + held * (end - start), [*before, (start, end)]))
        best.append(max(found, key=lambda one: one[0]))
    return best[-1][1]


def clusters(x: Tensor, count: int) -> list[tuple[int, list[int]]]:
    """Density peaks, and the tokens that are nearest to each of them."""
    if count == 0:
        return []
    every = range(len(x))
    far = [[float((x[i] - x[j]).norm()) / x.shape[1] ** 0.5 for j in every] for i in every]
    near = min(NEAR, count)
    density = [float(torch.tensor([-sum(d * d for d in sorted(row)[:near]) / near]).double().exp()) for row in far]
    widest = max(map(max, far))
    apart = [min((far[i][j] for j in every if density[j] > density[i]), default=widest) for i in every]
    peaks = sorted(sorted(every, key=lambda i: -apart[i] * density[i])[:count])
    owner = {i: min(peaks, key=lambda p, i=i: far[i][p]) for i in every if i not in peaks}
    return [(peak, [i for i, p in owner.items() if p == peak]) for peak in peaks]
