"""Frames that a question asks for, and few tokens of each (B-VLLM): rows that choose, duplicates, and a reader."""

from collections.abc import Sequence

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from torch.nn.functional import normalize

from winnow.core.reduction import Reduction
from winnow.parts.bipartite import bipartite
from winnow.parts.gumbel import gumbel
from winnow.parts.qformer import QFormer

TEMPERATURE = 0.5


class Chooser(nn.Module):
    """A Q-Former over the means of frames, each row of which chooses among these.

    Attributes:
        draws: what Gumbel's noise is drawn from, in training; None: there is none.
    """

    def __init__(self, width: int, frames: int, dim: int, heads: int, depth: int) -> None:
        super().__init__()
        self.draws: torch.Generator | None = None
        self.rows, self.wanted = QFormer(width, dim, heads, frames, depth), nn.Linear(dim, width)

    def logits(self, means: Float[Tensor, "b t d"], text: Float[Tensor, "b m d"]) -> Float[Tensor, "b l t"]:
        """How much each row wants each frame; no more rows than frames."""
        found, _ = self.rows(means, text, count=means.shape[1])
        return self.wanted(found) @ means.transpose(1, 2) / means.shape[2] ** 0.5

    def sure(self, means: Float[Tensor, "b t d"], text: Float[Tensor, "b m d"]) -> Float[Tensor, "b l t"]:
        """Shares of the frames in each row, without noise."""
        return (self.logits(means, text) / TEMPERATURE).softmax(-1)

    def forward(self, means: Float[Tensor, "b t d"], text: Float[Tensor, "b m d"]) -> Float[Tensor, "b l t"]:
        """Shares of the frames in each row, with noise where it is drawn."""
        if self.draws is None:
            return self.sure(means, text)
        z = self.logits(means, text)
        return ((z + gumbel(z, self.draws)) / TEMPERATURE).softmax(-1)


class Balanced(nn.Module):
    """What chooses frames, what reads the places of each, and what makes tokens of the language model of it.

    Args:
        frames: rows that choose.
        queries: tokens of a frame.
    """

    def __init__(self, width: int, frames: int, queries: int, dim: int, heads: int, depth: int) -> None:
        super().__init__()
        self.chooser = Chooser(width, frames, dim, heads, depth)
        self.reader = QFormer(width, dim, heads, queries, depth)
        self.out = nn.Sequential(nn.Linear(dim, width), nn.Linear(width, width))


def duplicates_of(rows: Float[Tensor, "l t"], threshold: float, roots: bool = True) -> tuple[Tensor, Tensor]:
    """Which rows of a selector stay, and which row each one is added to, itself where it stays.

    A row is a duplicate of the earlier one that it is most like, if their cosine, as a share from 0 to 1, is above the
    threshold.

    Args:
        roots: a duplicate of a duplicate is added to the row that this one is added to, and so on; else to a row that
            goes, and is lost.
    """
    unit = normalize(rows, dim=-1)
    alike = ((unit @ unit.T + 1) / 2).clamp_max(1).tril(-1)
    best, to = alike.max(1)
    own = torch.arange(len(rows), device=rows.device)
    stays = best <= threshold
    to = torch.where(stays, own, to)
    for _ in range((len(rows) - 1).bit_length() if roots else 0):
        to = to[to]
    return stays, to


def means_of_duplicates(rows: Float[Tensor, "l t"], stays: Bool[Tensor, " l"], to: Int[Tensor, " l"]) -> Tensor:
    """`[k, t]` each row that stays as the mean of itself and its duplicates."""
    sums = torch.zeros_like(rows).index_add(0, to, rows)
    counts = rows.new_zeros(len(rows)).index_add(0, to, torch.ones_like(rows[:, 0]))
    return (sums / counts.clamp_min(1)[:, None])[stays]


def tokens_of_each(cap: int, frames: int, queries: int, places: int) -> int:
    """Tokens of each frame, so that all together are at most `cap`, or one of each."""
    return max(1, min(cap // frames, queries, places))


def merged_to(x: Float[Tensor, "k n d"], count: int) -> tuple[Float[Tensor, "k m d"], Float[Tensor, "k m n"]]:
    """Tokens merged to so many, as ToMe does: by halves, then the rest; and the share of each in each."""
    share = torch.eye(x.shape[1], dtype=x.dtype, device=x.device).expand(len(x), -1, -1)
    while x.shape[1] > count:
        n = x.shape[1]
        r = n // 2 if n // 2 > count else n - count
        match = bipartite(list(normalize(x.detach(), dim=-1)), r, torch.arange(n, device=x.device), by_likeness=True)
        size = x.new_zeros(len(x), n - r).scatter_add_(1, match.cluster, torch.ones_like(x[..., 0]))
        step = Reduction.assign(match.cluster, 1 / size.gather(1, match.cluster), m=n - r)
        x, share = step.apply(x), step.apply(share)
    return x, share


def frames_apart(at: Sequence[int], frames: int) -> list[int]:
    """Frames for some rows, ascending and no two alike, near those that they want, which ascend."""
    found: list[int] = []
    for number, wanted in enumerate(at):
        least = found[-1] + 1 if found else 0
        found.append(max(least, min(wanted, frames - len(at) + number)))
    return found


def duplicates_naive(rows: Sequence[Sequence[float]], threshold: float) -> list[list[int]]:
    """Groups of rows, each under its first, by walking from row to row."""
    groups: dict[int, list[int]] = {}
    root: dict[int, int] = {}
    for i, row in enumerate(rows):
        best, to = -1.0, i
        for j in range(i):
            dot = sum(a * b for a, b in zip(row, rows[j], strict=True))
            size = (sum(a * a for a in row) * sum(b * b for b in rows[j])) ** 0.5
            if (alike := (dot / size + 1) / 2) > max(best, 0):
                best, to = alike, j
        root[i] = root[to] if best > threshold else i
        groups.setdefault(root[i], []).append(i)
    return list(groups.values())
