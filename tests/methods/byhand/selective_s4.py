"""A state space gone through token by token from both ends, and a small net on what it gives."""

from __future__ import annotations

import math

import torch
from byhand import Entry, Hand, Reference, keeping, share, top
from torch import Tensor
from torch.nn.functional import gelu

from methods.byhand import glorot
from methods.byhand.chunked import BUILDS, ROWS, Spot, normed, spots, waves

__all__ = ["BUILDS", "ROWS", "SETTINGS", "by_hand"]

SETTINGS = {"keep": "40%", "weights": "untrained"}
D, STATES = 48, 8


def by_hand(reference: Reference, sample: dict[str, Tensor], entry: Entry, *, keep: str, weights: str) -> Hand:
    kept = []
    for number, content in enumerate(entry.content):
        x = entry.embeds[0, content]
        score = scores(x, spots(reference, sample, entry, number))
        kept.append(top(score, share(keep, len(x))))
    return Hand(entry, {0: keeping(entry, kept)})


def scores(x: Tensor, where: list[Spot]) -> Tensor:
    shapes = [(D, x.shape[1]), (D, D), (D, STATES), (D, 4 * STATES), (D, STATES), (D, D), (D // 2, D), (2, D // 2)]
    enter, out, decay, read, turn, inner, first, last = glorot(shapes)
    x = torch.stack([normed(row) @ enter.T + waves(spot, D) for row, spot in zip(x, where, strict=True)])
    x = x + gelu(scanned(normed(x), decay, read, turn)) @ out.T
    hidden = gelu(normed(x) @ inner.T)
    own, shared = hidden[:, : D // 2], hidden[:, D // 2 :].mean(0)
    said = [gelu(torch.cat([row, shared]) @ first.T) @ last.T for row in own]
    return torch.stack([keep - drop for keep, drop in said])


def scanned(u: Tensor, decay: Tensor, read: Tensor, turn: Tensor) -> Tensor:
    """Channel by channel with states of their own, from the front and from behind."""
    a = torch.complex(-0.5 * decay.exp(), math.pi * (torch.arange(STATES) + turn))
    step = torch.tensor([0.01 * 50 ** (c / (D - 1)) for c in range(D)])[:, None]
    over = (a * step).exp()
    total = [row.clone() for row in u]
    for direction, order in enumerate((range(len(u)), range(len(u) - 1, -1, -1))):
        real, imaginary = read[:, 2 * STATES * direction :][:, : 2 * STATES].chunk(2, 1)
        weight, h = torch.complex(real, imaginary) * (over - 1) / a, torch.zeros_like(a)
        for t in order:
            h = over * h + u[t][:, None]
            total[t] += 2 * (weight * h).sum(1).real
    return torch.stack(total)
