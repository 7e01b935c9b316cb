"""A state space gone through token by token from both ends, and a small net on what it gives."""

from __future__ import annotations

import math

import torch
import zoo
from byhand import Entry, Hand, Reference, keeping, share, top
from torch import Tensor
from torch.nn.functional import gelu

from methods.byhand import frames_of, glorot, grid_of

SETTINGS = {"keep": "40%", "weights": "untrained"}
BUILDS = ("qwen2_5_vl", "llava_next_video", "llava_clip")
ROWS = {
    "qwen2_5_vl": ("3 W 6", "9", "2 X 4 W 5", "4 A 2"),
    "llava_next_video": ("3 W 6", "9", "2 W 4 W 5"),
}
D, STATES = 48, 8


def by_hand(reference: Reference, sample: dict[str, Tensor], entry: Entry, *, keep: str, weights: str) -> Hand:
    kept = []
    for number, content in enumerate(entry.content):
        x = entry.embeds[0, content]
        score = scores(x, spots(reference, sample, entry, number))
        kept.append(top(score, share(keep, len(x))))
    return Hand(entry, {0: keeping(entry, kept)})


def spots(reference: Reference, sample: dict[str, Tensor], entry: Entry, number: int) -> list[tuple[int, int, int]]:
    """Frame, row and column of each token."""
    frames, own = frames_of(sample, entry, number)
    if frames == 1:
        where = grid_of(reference, sample, number)
        return [(0, *where(int(cell))) for cell in entry.cells[number]]
    wide = math.isqrt(own)
    if "video_grid_thw" in sample:
        before = [int(sample["input_ids"][0, content[0]]) for content in entry.content[:number]]
        wide = int(sample["video_grid_thw"][before.count(zoo.VIDEO), 2]) // 2
    return [(i // own, *divmod(i % own, wide)) for i in range(frames * own)]


def scores(x: Tensor, where: list[tuple[int, int, int]]) -> Tensor:
    shapes = [(D, x.shape[1]), (D, D), (D, STATES), (D, 4 * STATES), (D, STATES), (D, D), (D // 2, D), (2, D // 2)]
    enter, out, decay, read, turn, inner, first, last = glorot(shapes)
    rows = []
    for row, spot in zip(x, where, strict=True):
        angles = [at * 0.01 ** (k / (D // 6)) for at in spot for k in range(D // 6)]
        waves = [math.sin(a) for a in angles] + [math.cos(a) for a in angles]
        rows.append(normed(row) @ enter.T + torch.tensor(waves))
    x = torch.stack(rows)
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


def normed(x: Tensor) -> Tensor:
    x = x - x.mean(-1, keepdim=True)
    return x / (x.pow(2).mean(-1, keepdim=True) + 1e-5).sqrt()
