"""The most seen tokens of each frame; the others of a scene are merged into dense ones of every second frame."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from byhand import Entry, Hand, Reference, keeping, share, top
from torch import Tensor
from torch.nn.functional import normalize
from videohand import cut_apart, peaks

from methods.byhand import feature_block, frames_of, shares

SETTINGS = {"keep": "40%", "segments": 3, "tau": 0.5, "context": 0.5, "every": 2}
BUILDS = ("qwen2_5_vl", "llava_next_video")
ROWS = dict.fromkeys(BUILDS, ("3 W 6", "9", "5 W 3"))
BETA = 0.6


def anchors(own: Sequence[int], context: Sequence[int], every: int, room: int) -> dict[int, int]:
    """How many anchors each frame of a segment has that has any: from its end, the first ones one more."""
    total = sum(context[t] for t in own)
    for stride in range(every, 0, -1):
        frames = own[::-1][::stride]
        given = {t: total // len(frames) + (i < total % len(frames)) for i, t in enumerate(frames)}
        if max(given.values()) <= room:
            break
    return given


def by_hand(
    reference: Reference,
    sample: dict[str, Tensor],
    entry: Entry,
    *,
    keep: int | str,
    segments: int,
    tau: float,
    context: float,
    every: int,
) -> Hand:
    vision, embeds, left = reference.vision(sample), entry.embeds.clone(), []
    looks = (vision.cls or vision.received)[feature_block(reference)] if entry.content else []
    for number, content in enumerate(entry.content):
        frames, places = frames_of(sample, entry, number)
        x = entry.embeds[0, content]
        look = looks[number].mean(0).unflatten(0, (frames, places))
        budgets = shares(share(keep, len(content), "down"), [places] * frames)
        counts = [int(budget * context) for budget in budgets]
        seen = [top(look[t], budgets[t] - counts[t]).tolist() for t in range(frames)]
        rest = [[n for n in range(places) if n not in seen[t]] for t in range(frames)]
        kept = [t * places + n for t in range(frames) for n in seen[t]]
        unit = normalize(x, dim=-1)
        for own in cut_apart(x.unflatten(0, (frames, places)).mean(1), tau, segments):
            others = [t * places + n for t in own for n in rest[t]]
            for t, count in anchors(own, counts, every, min(map(len, rest))).items():
                order, _ = peaks(x[[t * places + n for n in rest[t]]], 4)
                chosen = sorted(t * places + rest[t][i] for i in order[:count])
                kept += chosen
                nearest = [int(top(unit[chosen] @ unit[token], 1)) for token in others] if chosen else []
                for i, anchor in enumerate(chosen):
                    members = [token for token, to in zip(others, nearest, strict=True) if to == i]
                    weight = max(BETA, 1 / (len(members) + 1))
                    embeds[0, content[anchor]] = weight * x[anchor] + (1 - weight) * x[members].mean(0)
        left.append(torch.tensor(sorted(kept)))
    return Hand(replace(entry, embeds=embeds), {0: keeping(entry, left)})
