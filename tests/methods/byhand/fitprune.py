"""Behind each layer its share of the tokens goes: those that get the least from the pictures times from the text."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from byhand import Choice, Entry, Hand, Reference, Seen, cut, top
from torch import Tensor

SETTINGS = {"drops": (70, 200, 130, 40)}


def by_hand(reference: Reference, sample: dict[str, Tensor], entry: Entry, *, drops: Sequence[int]) -> Hand:
    def behind(layer: int) -> Choice:
        def choose(number: int, rows: Tensor, seen: Sequence[Seen]) -> Tensor:
            held = seen[layer].held.tolist()
            largest = reference.lm_attention(layer, seen[layer], entry).amax(0)
            pictures = {place for content in entry.content for place in content.tolist()}
            image = [largest[i] for i, place in enumerate(held) if place in pictures]
            text = [largest[i] for i, place in enumerate(held) if place > int(entry.items[-1][-1])]
            score = torch.stack(image).sum(0) * torch.stack(text).sum(0)
            n = len(entry.content[number])
            gone = sum(drop * n // 576 for drop in drops[: layer + 1])
            return rows[top(score[rows], max(1, n - gone))]

        return choose

    return Hand(entry, {layer + 1: cut(entry, behind(layer)) for layer in range(len(drops) - 1)})
