"""Retrieval heads: those that look back to where the token of now came before, and to what followed it there."""

import re
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from jaxtyping import Float, Int
from torch import Tensor

from winnow.core.budget import Budget
from winnow.core.errors import WinnowError
from winnow.core.kv import KVView
from winnow.core.kv_method import CacheMethod
from winnow.core.select import comparable, ranked
from winnow.core.step import Action, Observe, State

TIMES = 4
_NAME = re.compile(r"L(\d+)H(\d+)")


def heads_of(names: Iterable[str]) -> dict[int, frozenset[int]]:
    """KV heads by layer, of names such as L3H0."""
    found: dict[int, set[int]] = {}
    for name in names:
        match = _NAME.fullmatch(name)
        if match is None:
            raise WinnowError(f"heads: {name!r} names no head; write layer and KV head, from 0, as L3H0.")
        found.setdefault(int(match[1]), set()).add(int(match[2]))
    return {layer: frozenset(own) for layer, own in sorted(found.items())}


def known_heads(names: Iterable[str] | None, view: KVView) -> frozenset[int]:
    """The named heads of the layer of a view."""
    found = heads_of(names or ())
    own = found.get(view.layer, frozenset())
    if max(found, default=0) >= view.depth or (view.own_heads is None and max(own, default=0) >= view.heads):
        raise WinnowError(
            f"heads: the model has {view.depth} layers of {view.heads} KV heads, and {', '.join(names or ())} name "
            "others; winnow.calibrate finds those of a model."
        )
    return own


def repeated(words: Int[Tensor, " v"], period: int, seed: int = 0) -> Int[Tensor, "1 t"]:
    """Distinct random words, all of them several times over.

    Args:
        words: to choose from; where there are fewer than `period`, all are taken.
    """
    order = torch.randperm(len(words), generator=torch.Generator().manual_seed(seed))[:period]
    return words[order.to(words.device)].repeat(TIMES)[None]


@dataclass(frozen=True)
class Searched(CacheMethod):
    """Changes nothing; scores the heads of each layer on a prompt that ends in repeated words.

    Attributes:
        found: by layer, `[2, G]` on the host: how much a KV head attends to what followed the word of now when it came
            before (induction), and to that word there (echo); means over all such pairs, of its best query head.
    """

    found: dict[int, Tensor] = field(default_factory=dict, compare=False, metadata={"setting": False})

    slug: ClassVar[str] = "retrieval-heads"
    identity: ClassVar[dict[str, Any] | None] = {}

    def evict(self, view: KVView, state: State) -> tuple[Action, State]:
        self.found[view.layer] = head_scores(view, view.n // TIMES).cpu()
        return Observe(), state


def head_scores(view: KVView, period: int) -> Float[Tensor, "2 g"]:
    """Induction and echo scores of the KV heads on a prompt whose last slots are `period` words, several times."""
    start, device = view.n - TIMES * period, view.keys.device
    total = torch.zeros(2, view.b, view.queries.shape[1], device=device)
    pairs = 0
    for part, attention in view.attention_parts():
        at = torch.arange(view.n, device=device)[view.n - view.rows() :][part]
        for times in range(1, TIMES):
            before = at - times * period
            copies = before >= start
            pairs += int(copies.sum())
            for own, shift in zip(total, (1, 0), strict=True):
                column = (before + shift).clamp_min(0)[None, None, :, None].expand(*attention.shape[:3], 1)
                own += (attention.gather(3, column)[..., 0] * copies).sum(2)
    return (total / max(1, pairs)).unflatten(2, (view.heads, view.group)).amax(3).mean(1)


def best_heads(scores: dict[int, Float[Tensor, "2 g"]], induction: Budget, echo: Budget) -> tuple[str, ...]:
    """The names of the heads that are among the best of all layers by either score; at least one by each.

    Args:
        induction, echo: heads by each score, or their share of all.
    """
    layers = sorted(scores)
    names = [(layer, head) for layer in layers for head in range(scores[layer].shape[1])]
    chosen: set[tuple[int, int]] = set()
    for row, budget in zip(torch.cat([scores[layer] for layer in layers], 1), (induction, echo), strict=True):
        order = ranked(comparable(row[None]))[0, : budget.of(len(names))]
        chosen |= {names[i] for i in order.tolist()}
    return tuple(f"L{layer}H{head}" for layer, head in sorted(chosen))
