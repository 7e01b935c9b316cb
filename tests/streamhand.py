"""A stream by hand: nothing is dropped from the cache, and what was evicted is masked, head by head.

Nothing here imports winnow.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from byhand import Entry, Reference, Seen
from torch import Tensor
from transformers import DynamicCache

Evict = Callable[[int, Tensor, list[int]], list[int]]
"""For a layer, its keys `[N, d]` of one head, and the slots that the head has read: those that it reads from now on."""


class StreamHand:
    """One stream on a plain model; slots are counted as they are read."""

    def __init__(self, reference: Reference, evict: Evict) -> None:
        self.reference, self.evict = reference, evict
        config = reference.lm.config
        self.heads, self.group = config.num_key_value_heads, config.num_attention_heads // config.num_key_value_heads
        self.cache = DynamicCache(config=config)
        self.alive = [[[] for _ in range(self.heads)] for _ in reference.lm.layers]
        self.seen, self.next = 0, 0

    @torch.no_grad()
    def read(self, hidden: Tensor, positions: Tensor, evict: bool = True) -> Tensor:
        """Rows `[1, n, D]` at their positions; the logits behind the last one."""
        n = hidden.shape[1]
        new = list(range(self.seen, self.seen + n))
        self.seen += n
        for i, layer in enumerate(self.reference.lm.layers):
            mask = torch.zeros(1, self.heads * self.group, n, self.seen, dtype=torch.bool)
            for head in range(self.heads):
                own = slice(head * self.group, (head + 1) * self.group)
                mask[:, own, :, self.alive[i][head]] = True
                mask[:, own, :, new] = torch.ones(n, n, dtype=torch.bool).tril()
            hidden = self.reference._layer(layer, hidden, positions, self.cache, mask)
            keys = self.cache.layers[i].keys[0]
            for head in range(self.heads):
                held = self.alive[i][head] + new
                self.alive[i][head] = self.evict(i, keys[head], held) if evict else held
        return self.reference.model.lm_head(self.reference.lm.norm(hidden)[:, -1])

    def feed(self, entry: Entry, kept: Seen) -> None:
        """A part of the stream, as the plain model would be given it, less what is dropped before the LM."""
        self.read(kept.hidden, entry.positions[..., kept.held] + self.next)
        self.next += int(entry.positions.max()) + 1

    def answer(self, question: Tensor, said: Sequence[int]) -> Tensor:
        """`[T, vocabulary]` behind the question `[1, m]`, and behind each token that was said."""
        embed, place, logits = self.reference.model.get_input_embeddings(), self.next, []
        for step, ids in enumerate((question, *(torch.tensor([[token]]) for token in said))):
            at = torch.arange(place, place + ids.shape[1])
            positions = at.expand(3, 1, -1) if self.reference.mrope else at[None]
            logits.append(self.read(embed(ids), positions, evict=step == 0))
            place += ids.shape[1]
        return torch.cat(logits)


def sinks_and_window(keep: int, sinks: int = 4) -> Evict:
    """StreamingLLM."""
    return lambda layer, keys, held: held if len(held) <= keep else held[:sinks] + held[sinks - keep :]


def short_keys(keep: int) -> Evict:
    """The slots of the smallest norm, which differ from head to head."""

    def evict(layer: int, keys: Tensor, held: list[int]) -> list[int]:
        norms = keys.norm(dim=-1).tolist()
        return sorted(sorted(held, key=lambda slot: norms[slot])[:keep])

    return evict
