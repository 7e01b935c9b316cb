"""Attention of rows to what is kept beside the sequence, and its parameters: keys and values that are made once."""

from collections.abc import Callable
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention

from winnow.core.cross_read import Rows
from winnow.core.info import ModelInfo
from winnow.core.select import count_broken
from winnow.core.view import View
from winnow.parts.learned import UNTRAINED, learned
from winnow.parts.sinusoid import sinusoid


def attend(
    q: Float[Tensor, "*lanes h n d"],
    k: Float[Tensor, "*lanes g r d"],
    v: Float[Tensor, "*lanes g r d"],
    seen: Bool[Tensor, "*lanes #n r"],
) -> Float[Tensor, "*lanes n hd"]:
    """What each row reads, its heads side by side. Heads share keys in groups; a row that sees nothing gets zeros."""
    heads, groups, n = q.shape[-3], k.shape[-3], q.shape[-2]
    grouped = q.unflatten(-3, (groups, heads // groups)).flatten(-3, -2)
    mask = seen if seen.shape[-2] == 1 else torch.cat([seen] * (heads // groups), -2)
    mask = mask.unsqueeze(-3)
    there = mask.any(-1, keepdim=True)
    mixed = scaled_dot_product_attention(grouped, k, v, attn_mask=mask | ~there).masked_fill(~there, 0)
    return mixed.unflatten(-2, (heads // groups, n)).flatten(-4, -3).transpose(-3, -2).flatten(-2)


def attend_naive(q: Tensor, k: Tensor, v: Tensor, seen: Tensor) -> Tensor:
    """The same of one lane, row by row and head by head."""
    heads, n, d = q.shape
    out = torch.zeros(n, heads, d, dtype=q.dtype)
    for row in range(n):
        there = seen[min(row, len(seen) - 1)].nonzero()[:, 0]
        for head in range(heads) if len(there) else ():
            group = head * len(k) // heads
            share = (k[group, there] @ q[head, row] / d**0.5).softmax(0)
            out[row, head] = share @ v[group, there]
    return out.flatten(1)


class Beside(nn.Module):
    """Keys and values of tokens that are kept beside the sequence.

    Args:
        width: of a token.
        groups, dim: heads of keys and values, and the width of one.
    """

    def __init__(self, width: int, groups: int, dim: int) -> None:
        super().__init__()
        self.groups = groups
        self.norm = nn.RMSNorm(width, eps=1e-6)
        self.k, self.v = (nn.Linear(width, groups * dim) for _ in range(2))

    def forward(
        self, x: Float[Tensor, "b r w"], place: Float[Tensor, "b r w"] | None = None
    ) -> tuple[Float[Tensor, "b g r d"], Float[Tensor, "b g r d"]]:
        """`place` is added to what keys are made of. What is not finite becomes zeros, and is to be hidden."""
        normed = self.norm(x.masked_fill(~x.isfinite(), 0).to(self.norm.weight))
        made = (self.k(normed if place is None else normed + place.to(normed)), self.v(normed))
        k, v = (part.unflatten(-1, (self.groups, -1)).transpose(1, 2) for part in made)
        return k, v


def placed(view: View) -> Float[Tensor, "b r w"]:
    """The frame, row and column of each token of a view as sines and cosines, each in a third of the channels."""
    layout, width = view.layout, view.tokens.shape[-1]
    place = torch.tensor(layout.place[layout.content][:, 1:], device=view.ids.device)[view.ids]
    made = sinusoid(place, width // 3).flatten(-2)
    return nn.functional.pad(made, (0, width - made.shape[-1]))


class GatedHeads(nn.Module):
    """Adds what a layer's own queries read beside the sequence to what its heads give, by a gate of each row.

    `gate` is opened by training: at 0 nothing is added.
    """

    def __init__(self, width: int, heads: int, groups: int, dim: int) -> None:
        super().__init__()
        self.beside = Beside(width, groups, dim)
        self.open, self.gate = nn.Linear(heads * dim, 1), nn.Parameter(torch.zeros(1))

    def forward(
        self, o: Float[Tensor, "n hd"], q: Float[Tensor, "h n d"], k: Tensor, v: Tensor, seen: Tensor
    ) -> Float[Tensor, "n hd"]:
        return self.open(o.to(k)).tanh() * self.gate.tanh() * attend(q.to(k), k, v, seen)


class GatedStates(nn.Module):
    """Adds what states read beside the sequence, by queries of their own, to these states; one gate for all rows."""

    def __init__(self, width: int, heads: int, groups: int, dim: int) -> None:
        super().__init__()
        self.heads, self.norm = heads, nn.RMSNorm(width, eps=1e-6)
        self.q, self.out = nn.Linear(width, heads * dim), nn.Linear(heads * dim, width, bias=False)
        self.beside, self.gate = Beside(width, groups, dim), nn.Parameter(torch.zeros(1))

    def forward(
        self, h: Float[Tensor, "*t n w"], k: Tensor, v: Tensor, seen: Tensor, gate: Tensor | None = None
    ) -> Float[Tensor, "*t n w"]:
        """`gate` takes the place of its own."""
        q = self.q(self.norm(h.to(self.norm.weight))).unflatten(-1, (self.heads, -1)).transpose(-3, -2)
        return (self.gate if gate is None else gate).tanh() * self.out(attend(q.to(k), k, v, seen))


def gated(slug: str, weights: str | None, gate: float, info: ModelInfo, make: Callable[..., nn.ModuleDict]) -> Any:
    """The trained readers of a method; of untrained ones, all gates stand at `gate`."""
    readers: Any = learned(slug, weights, info, make)
    if weights == UNTRAINED:
        for reader in readers.values():
            nn.init.constant_(reader.gate, gate)
    return readers


def kept_beside(readers: Any, x: Float[Tensor, "b r w"], view: View, place: Tensor | None = None) -> dict[str, Tensor]:
    """What a method remembers of items: keys and values for each reader, and which tokens can be seen, `[b, 1, r]`."""
    seen = x.isfinite().all(-1)
    count_broken(~seen, view)
    found = {"seen": seen[:, None]}
    for name, reader in (readers or {}).items():
        found[f"{name} k"], found[f"{name} v"] = reader.beside(x, place)
    return found


def joined(rows: Rows, name: str) -> tuple[Tensor, Tensor, Tensor]:
    """Keys, values and what can be seen for one reader, of all items that rows may read."""
    names = (f"{name} k", f"{name} v", "seen")
    k, v, seen = (torch.cat([own[field] for own in rows.memory], 1) for field in names)
    return k, v, seen
