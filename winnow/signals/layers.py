"""Signals of what an LM layer does with its tokens: its keys, who votes for them, how far they are moved, and where."""

from dataclasses import dataclass
from typing import ClassVar, Literal, Self

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from winnow.core.errors import UnsupportedError
from winnow.core.info import ModelInfo
from winnow.core.signal import Site
from winnow.signals.language import SLOTS, LayerModules, LMAttentionInputs, LMSignal


@dataclass(frozen=True)
class PageRank(LMSignal):
    """Importance of the item's tokens by PageRank over the attention of one LM layer: `[b, N]`, fp32.

    Tokens of the sequence vote for what they attend to, and a vote weighs as much as the voter is worth. One score for
    each head; the root of their mean square is returned. Keys of a cache take no part. One T × T table for one head.

    Args:
        layer: the LM layer.
        temperature: of the softmax.
        rounds: how often votes are counted, from equal worth of all tokens.
        damping: share of the worth that all tokens keep getting equally.
    """

    temperature: float = 0.1
    rounds: int = 5
    damping: float = 0.0

    def read(self, seen: LMAttentionInputs) -> Float[Tensor, "b p"]:
        wide = torch.promote_types(seen.q.dtype, torch.float32)
        found = torch.zeros(len(seen.packing.sizes), seen.packing.width, dtype=wide, device=seen.q.device)
        for b, size in enumerate(seen.packing.sizes):
            row = seen.of_row(b)
            slots = (~row.packing.mask[0]).to(torch.uint8).argsort(stable=True)[:size]
            hidden = ~row.visible(slots[None])[0, :, row.before :][:, slots]
            q, k = row.q[0, :, slots], row.k[0, :, row.before :][:, slots]
            found[b, slots] = self.rank(q.to(wide), k.to(wide), row.scaling, hidden)
        return found

    def rank(
        self, q: Float[Tensor, "h t d"], k: Float[Tensor, "g t d"], scaling: float, hidden: Bool[Tensor, "t t"]
    ) -> Float[Tensor, " t"]:
        """The importance of each token; `hidden` are the keys that a query does not see."""
        groups, t = q.shape[0] // k.shape[0], q.shape[1]
        votes, total = q.new_empty(t, t), q.new_zeros(t)
        for head in range(q.shape[0]):
            torch.mm(q[head] * (scaling / self.temperature), k[head // groups].T, out=votes)
            torch.softmax(votes.masked_fill_(hidden, -torch.inf), -1, out=votes)
            worth = q.new_full((1, t), 1 / t)
            for _ in range(self.rounds):
                worth = (worth @ votes).mul_(1 - self.damping).add_(self.damping / t)
            total += worth[0].square()
        return total.div_(q.shape[0]).sqrt_()


def page_rank_naive(logits: Float[Tensor, "h t t"], temperature: float, rounds: int, damping: float) -> Tensor:
    """What `PageRank.rank` computes, from the whole matrices: the reference that it is tested against."""
    votes = (logits / temperature).softmax(-1)
    t = votes.shape[-1]
    worth = torch.full((votes.shape[0], 1, t), 1 / t, dtype=votes.dtype)
    for _ in range(rounds):
        worth = worth @ votes * (1 - damping) + damping / t
    return worth[:, 0].square().mean(0).sqrt()


def transition(
    before: Float[Tensor, "*b n d"], after: Float[Tensor, "*b n d"], real: Bool[Tensor, "*b n"]
) -> Float[Tensor, "*b n"]:
    """How far a module moves each token: ratio of the norms × softmax, over the sequence, of the turn (1 − cosine)."""
    wide = torch.promote_types(before.dtype, torch.float32)
    before, after = before.to(wide), after.to(wide)
    turn = 1 - torch.cosine_similarity(before, after, dim=-1)
    return after.norm(dim=-1) / before.norm(dim=-1) * turn.masked_fill(~real, -torch.inf).softmax(-1)


@dataclass(frozen=True)
class TokenTransition(LMSignal):
    """How far an LM layer moves each token: the transitions of its attention and its MLP, `[b, N]`, fp32.

    A module is compared as it sees its input, behind the norm, and with its output before that is added.
    """

    def site(self, info: ModelInfo) -> Site:
        return Site("lm", self.layer, "hidden")

    def read(self, seen: LayerModules) -> Float[Tensor, "b p"]:
        return transition(*seen.attention, seen.mask) + transition(*seen.mlp, seen.mask)


@dataclass(frozen=True)
class LayerChange(LMSignal):
    """How much an LM layer changes each token: the norm of output less input, `[b, N]`, fp32."""

    def site(self, info: ModelInfo) -> Site:
        return Site("lm", self.layer, "hidden")

    def read(self, seen: LayerModules) -> Float[Tensor, "b p"]:
        wide = torch.promote_types(seen.before.dtype, torch.float32)
        return (seen.after.to(wide) - seen.before.to(wide)).norm(dim=-1)


def key_norms(seen: LMAttentionInputs) -> Float[Tensor, "b p"]:
    """The L1 norm of each slot's keys, all heads together."""
    k = seen.k[:, :, seen.before :]
    return k.to(torch.promote_types(k.dtype, torch.float32)).abs().sum((1, 3))


@dataclass(frozen=True)
class KeyNorm(LMSignal):
    """The L1 norm of the item's keys in one LM layer, all heads together, after rotation: `[b, N]`, fp32."""

    def read(self, seen: LMAttentionInputs) -> Float[Tensor, "b p"]:
        return key_norms(seen)


@dataclass(frozen=True)
class LayerStates(LMSignal):
    """What an LM layer gives for the item's tokens: `[b, N, D]`.

    Args:
        layer: the LM layer.
        norm: whether it goes through the norm that stands behind the last layer.
        width: of the LM; filled in for the model.
    """

    norm: bool = False
    width: int = 0

    def resolve(self, info: ModelInfo) -> Self:
        return super().resolve(info)._with(width=info.width)

    def site(self, info: ModelInfo) -> Site:
        return Site("lm", self.layer, "hidden")

    def read(self, seen: LayerModules) -> Float[Tensor, "b p d"]:
        if not self.norm:
            return seen.after
        if seen.last_norm is None:
            raise UnsupportedError("this language model has no last norm that winnow knows; use norm=false.")
        return seen.last_norm(seen.after)

    def sample(self, generator: torch.Generator, b: int, n: int) -> Tensor:
        return torch.randn(b, n, self.width, generator=generator)


@dataclass(frozen=True)
class RowStates(LayerStates):
    """What an LM layer gives for all slots of the item's row, text included: `[b, P, D]`."""

    per: ClassVar[Literal["token", "item"]] = "item"

    def sample(self, generator: torch.Generator, b: int, n: int) -> Tensor:
        return torch.randn(b, SLOTS, self.width, generator=generator)
