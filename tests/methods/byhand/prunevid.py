"""What stands still in a scene becomes one token, clusters their means; behind a layer goes what no word looks at."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from byhand import Entry, Hand, Reference, Seen, cut
from torch import Tensor
from videohand import clusters, contiguous

from methods.byhand import frames_of

SETTINGS = {"temporal": 0.25, "tau": 0.8, "beta": 0.5, "small": 3, "alpha": 0.6, "layer": 1, "cache": False}
BUILDS = ("qwen2_5_vl", "llava_next_video")
ROWS = dict.fromkeys(BUILDS, ("3 W 6", "9", "5 W 3"))


def still(x: Tensor, own: Sequence[int], place: int, tau: float) -> bool:
    """Whether all pairs of a segment's frames are alike at a place, on average."""
    pairs = [(s, t) for s in own for t in own if s != t]
    alike = [float(torch.cosine_similarity(x[s, place], x[t, place], dim=0)) for s, t in pairs]
    return bool(pairs) and sum(alike) / len(pairs) > tau


def by_hand(
    reference: Reference,
    sample: dict[str, Tensor],
    entry: Entry,
    *,
    temporal: float,
    tau: float,
    beta: float,
    small: int,
    alpha: float,
    layer: int,
    cache: bool,
) -> Hand:
    """The sizes of the groups are those of before the LM: nothing else takes tokens away."""
    group_of: dict[int, tuple[int, int]] = {}

    def merge(seen: Sequence[Seen]) -> Seen:
        now = seen[-1]
        hidden, stay = now.hidden.clone(), torch.ones(len(now.held), dtype=torch.bool)
        for number, content in enumerate(entry.content):
            frames, each = frames_of(sample, entry, number)
            x = now.hidden[0, content].unflatten(0, (frames, each))
            stay[content] = False
            groups = []
            for own in contiguous(clusters(x.mean(1), max(1, int(frames * temporal)), 7)[1]):
                alike = [n for n in range(each) if still(x, own, n, tau)]
                others = [n for n in range(each) if n not in alike]
                groups += [(own, alike), *(([t], others) for t in own)]
            for which, (own, places) in enumerate(groups):
                means, centres, owner = x[own][:, places].mean(0), list(range(len(places))), list(range(len(places)))
                if len(places) > small:
                    centres, owner = clusters(means, max(1, int(len(places) * beta)), 7)
                for i, centre in enumerate(centres):
                    at = int(content[own[0] * each + places[centre]])
                    hidden[0, at] = means[[j for j, to in enumerate(owner) if to == i]].mean(0)
                    stay[at] = True
                    group_of[at] = (number, which)
        return Seen(hidden[:, stay], now.held[stay])

    def choose(number: int, rows: Tensor, seen: Sequence[Seen]) -> Tensor:
        was = seen[layer]
        weights = reference.lm_attention(layer, was, entry)
        score = weights[:, was.held > entry.items[-1][-1]][..., rows].amax((0, 1)).tolist()
        groups: dict[tuple[int, int], list[int]] = {}
        for i, row in enumerate(rows.tolist()):
            groups.setdefault(group_of[int(was.held[row])], []).append(i)
        kept = []
        for own in groups.values():
            kept += sorted(own, key=lambda i: -score[i])[: max(1, int(alpha * len(own)))]
        return rows[sorted(kept)]

    return Hand(entry, {0: merge, layer + 1: cut(entry, choose)})
