"""RazorAttention (arXiv 2407.15891): full caches for the heads that retrieve, sinks and a buffer for the others.

Looks at: positions; once per model, attention of each head on repeated random tokens. Cost: none for the cache, but
heads hold unequal numbers of slots, which are attended to one by one; the search is a forward of `tokens` · 4 tokens.

Departs from the paper: the sinks and the compensation token of a head count in its budget. The least buffer and its
share of the prompt are as remembered, not as read. Models with ALiBi are not known here.

Departs from the released code: no code of the authors has been released.
"""

from collections.abc import Callable
from typing import Any

import torch

from winnow.contract import (
    Action,
    Budget,
    CacheMethod,
    Count,
    KVBudget,
    KVReduce,
    KVView,
    Observe,
    Share,
    State,
    WinnowError,
    register,
)
from winnow.parts.folding import fold
from winnow.parts.retrieval import Searched, best_heads, heads_of, known_heads, repeated

_MANY = 2**40


@register("razorattention")
class RazorAttention(CacheMethod):
    """Keeps all slots of heads that retrieve; of the others sinks, the newest, and one for the rest.

    Args:
        keep: slots of a head that does not retrieve; none: the larger of `least` and `part` of the prompt.
        heads: those that retrieve, as L3H0 (layer 3, KV head 0); `winnow.calibrate` finds them for a model. Without
            any, no head retrieves.
        sinks: first slots that stay.
        least: slots that such a head holds at least, where `keep` is none.
        part: share of the prompt that it holds, where `keep` is none.
        compensate: whether the mean of what was dropped stays as one slot that weighs as many as they were.
        every: decoded tokens between two times that the oldest are dropped.
        tokens: distinct ones that the search repeats.
        induction: heads that the search takes by their attention to what followed a token when it came before.
        echo: heads that it takes by their attention to that token.
    """

    identity = {"keep": "100%"}
    decodes = True

    keep: KVBudget | None = None
    heads: tuple[str, ...] | None = None
    sinks: Count = 4
    least: Count = 4000
    part: Share = 0.2
    compensate: bool = True
    every: Count = 1
    tokens: Count = 2500
    induction: Budget = Budget("14%")
    echo: Budget = Budget("1%")

    def check(self) -> None:
        heads_of(self.heads or ())
        if self.tokens < 2:
            raise WinnowError(f"razorattention: tokens={self.tokens}; allowed: at least 2 to repeat.")

    def calibrate(self, run: Callable[..., Any]) -> "RazorAttention":
        """With the heads that retrieve in a model."""
        search = Searched()
        run(search, lambda words: repeated(words, self.tokens))
        return self.replace(heads=best_heads(search.found, self.induction, self.echo))

    def ends(self, view: KVView) -> tuple[int, int]:
        return self.sinks, 1

    def evict(self, view: KVView, state: State) -> tuple[Action, State]:
        """A prompt is cut to what a head may hold; while decoding, the oldest slots join the one for the rest."""
        most = state.item.get("most")
        if view.moment != "decode":
            most = torch.full((view.b,), self._room(view))
            state = State(state.token, {**state.item, "most": most}, state.request, state.summed)
        late = max(1, self.every) if view.moment == "decode" else 1
        found = None if most is None else self._razed(view, most.tolist(), late)
        return (Observe() if found is None else found), state

    def shorten(self, view: KVView, keep: KVBudget) -> KVReduce | None:
        return self._razed(view, [self.replace(keep=keep)._room(view)] * view.b, 1)

    def _room(self, view: KVView) -> int:
        """Slots that a head holds if it does not retrieve."""
        least = sum(self.ends(view)) + self.compensate
        if self.keep is None:
            return max(least, self.least, view.n - view.fresh + int(self.part * view.fresh))
        room = view.budget(self.keep)
        if room == view.n:  # what a count allows beyond the prompt
            room = self.keep.of(_MANY, _MANY, layer=view.layer, depth=view.depth, slot_bytes=view.slot_bytes)
        return max(least, room)

    def _razed(self, view: KVView, most: list[int], late: int) -> KVReduce | None:
        """What is left where heads that do not retrieve hold at least `late` slots more than they may."""
        full = known_heads(self.heads, view)
        far = torch.tensor([head not in full for head in view.own_heads or range(view.heads)])
        over = torch.tensor([view.n - m if view.n - m >= late else 0 for m in most])
        gone = far * over[:, None]
        if not bool(gone.any()):
            return None
        one = ((gone > 0) & self.compensate).long()
        sinks = torch.full_like(gone, self.sinks)
        return fold(view, sinks, gone + one, one, (view.n - gone).flatten().tolist())
