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
    """One stream on a plain model; slots are counted as they are read.

    Args:
        shifted: so many sinks are moved to right before the window after each part, and positions have no gaps.
    """

    def __init__(self, reference: Reference, evict: Evict, shifted: int = 0) -> None:
        self.reference, self.evict, self.shifted = reference, evict, shifted
        config = reference.lm.config
        self.heads, self.group = config.num_key_value_heads, config.num_attention_heads // config.num_key_value_heads
        self.cache = DynamicCache(config=config)
        self.alive = [[[] for _ in range(self.heads)] for _ in reference.lm.layers]
        self.seen, self.next = 0, 0
        self.moved: dict[int, int] = {}

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
            if self.shifted and evict:
                self._follow(i, hidden)
        return self.reference.model.lm_head(self.reference.lm.norm(hidden)[:, -1])

    def _follow(self, layer: int, hidden: Tensor) -> None:
        """Keys of the sinks, turned from where they are to right before the first slot of the window."""
        held = self.alive[layer][0]
        if len(held) <= self.shifted:
            return
        moved = self.moved.setdefault(layer, 0)
        self.moved[layer] = held[self.shifted] - self.shifted
        by = torch.full((1, self.shifted), self.moved[layer] - moved)
        cos, sin = self.reference.lm.rotary_emb(hidden[:, : self.shifted], by)
        keys = self.cache.layers[layer].keys
        sinks = keys[:, :, : self.shifted]
        first, second = sinks.chunk(2, -1)
        keys[:, :, : self.shifted] = sinks * cos + torch.cat([-second, first], -1) * sin

    def feed(self, entry: Entry, kept: Seen) -> None:
        """A part of the stream, as the plain model would be given it, less what is dropped before the LM."""
        if self.shifted:
            self.read(kept.hidden, torch.arange(self.next, self.next + len(kept.held))[None])
            self.next += len(kept.held)
            return
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
