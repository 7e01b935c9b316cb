"""A small language model that says what the tokens of a chunk show, word by word until it stops (LangDC)."""

from typing import NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from torch.nn.functional import gelu, layer_norm

from winnow.parts.transformer import Layer, place_waves

STOP, START = 0, 1  # its first words


class Said(NamedTuple):
    """Captions of some chunks.

    Attributes:
        words: `[b, n]`; STOP behind the end.
        counts: `[b]` words of each, the stop not among them.
        tokens: `[b, n, D]` what stands for the words.
        weights: `[b, n, s]` what was attended to of the chunk when the word was chosen, in the last layer.
    """

    words: Int[Tensor, "b n"]
    counts: Int[Tensor, " b"]
    tokens: Float[Tensor, "b n d"]
    weights: Float[Tensor, "b n s"]


class Captioner(nn.Module):
    """Words behind the tokens of a chunk, and a projector from its states to the width of the tokens.

    Args:
        given: width of the tokens.
        words: of its vocabulary, STOP and START among them.
    """

    def __init__(self, given: int, words: int, width: int = 96, depth: int = 3, heads: int = 4) -> None:
        super().__init__()
        self.enter, self.words = nn.Linear(given, width), nn.Embedding(words, width)
        self.layers = nn.ModuleList(Layer(width, heads) for _ in range(depth))
        self.norm, self.up, self.down = nn.LayerNorm(width), nn.Linear(width, 2 * width), nn.Linear(2 * width, given)

    def states(
        self,
        chunks: Float[Tensor, "b s d"],
        place: Int[Tensor, "b s 3"],
        there: Bool[Tensor, "b s"],
        words: Int[Tensor, "b n"],
    ) -> tuple[Float[Tensor, "b n w"], Float[Tensor, "b n s"]]:
        """The state of each word behind a chunk, and its attention to the chunk in the last layer.

        Args:
            place: frame of the chunk, row and column of each token.
            there: which tokens there are.
        """
        (b, s), n, width = chunks.shape[:2], words.shape[1], self.words.embedding_dim
        seen = self.enter(layer_norm(chunks, chunks.shape[-1:])) + place_waves(place, width)
        at = torch.arange(n, device=words.device)
        there = there | ~there.any(-1, keepdim=True)  # of what is all broken, zeros are read
        x = torch.cat([seen, self.words(words) + place_waves(at[:, None], width)], 1)
        own = torch.cat([there.new_zeros(s, n), (at[:, None] >= at)], 0).expand(b, -1, -1)
        mask = torch.cat([there[:, None].expand(-1, s + n, -1), own], 2)
        weights = x.new_zeros(0)
        for layer in self.layers:
            x, weights = layer(x, mask)
        share = weights.mean(1)[:, s:, :s]
        return self.norm(x[:, s:]), share / share.sum(-1, keepdim=True).clamp_min(torch.finfo(share.dtype).tiny)

    def logits(self, states: Float[Tensor, "*b w"]) -> Float[Tensor, "*b v"]:
        return states @ self.words.weight.mT

    def soft(self, states: Float[Tensor, "*b w"]) -> Float[Tensor, "*b d"]:
        """States in the width of the tokens."""
        return self.down(gelu(self.up(states)))

    def forward(
        self,
        chunks: Float[Tensor, "b s d"],
        place: Int[Tensor, "b s 3"],
        there: Bool[Tensor, "b s"],
        most: int,
        layer: int = -1,
    ) -> Said:
        """Say what chunks show, greedily.

        Args:
            most: words of a caption.
            layer: whose output stands for a word: -1 the last, 0 the embedding of the word.
        """
        words = torch.full((len(chunks), 1), START, device=chunks.device)
        ended = torch.zeros(len(chunks), dtype=torch.bool, device=chunks.device)
        for _ in range(most):
            with torch.no_grad():
                states, _ = self.states(chunks, place, there, words)
                new = self.logits(states[:, -1])
                new[:, START] = -torch.inf
                best = new.argmax(-1).masked_fill(ended, STOP)
            ended = ended | (best == STOP)
            words = torch.cat([words, best[:, None]], 1)
        soft, weights = self.told(chunks, place, there, words)
        tokens = self.soft(self.words(words[:, 1:])) if layer == 0 else soft + weights @ chunks
        return Said(words[:, 1:], (words[:, 1:] != STOP).sum(1), tokens, weights)

    def told(
        self,
        chunks: Float[Tensor, "b s d"],
        place: Int[Tensor, "b s 3"],
        there: Bool[Tensor, "b s"],
        words: Int[Tensor, "b n"],
    ) -> tuple[Float[Tensor, "b m d"], Float[Tensor, "b m s"]]:
        """The projected states of words behind a start, with gradients for the projector alone, and their weights."""
        with torch.no_grad():
            states, weights = self.states(chunks, place, there, words)
        return self.soft(states[:, 1:]), weights[:, :-1]
