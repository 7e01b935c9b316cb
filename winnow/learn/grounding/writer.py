"""A small encoder and decoder that writes words behind what a connector's queries have read."""

from __future__ import annotations

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from winnow.parts.transformer import Layer, place_waves


class Writer(nn.Module):
    """A prompt of words and the queries go through the encoder together; the decoder reads both.

    Args:
        words: of its vocabulary.
    """

    def __init__(self, words: int, width: int = 96, depth: int = 2, heads: int = 4) -> None:
        super().__init__()
        self.words = nn.Embedding(words, width)
        self.encoder = nn.ModuleList(Layer(width, heads) for _ in range(depth))
        self.decoder = nn.ModuleList(Layer(width, heads, cross=True) for _ in range(depth))
        self.norm = nn.LayerNorm(width)

    def encode(self, read: Float[Tensor, "b m w"], prompt: Int[Tensor, "b p"]) -> Float[Tensor, "b n w"]:
        x = torch.cat([read, self._embedded(prompt)], 1)
        for layer in self.encoder:
            x, _ = layer(x)
        return x

    def forward(self, memory: Float[Tensor, "b n w"], given: Int[Tensor, "b a"]) -> Float[Tensor, "b a v"]:
        """Logits of the word behind each that is given."""
        x = self._embedded(given)
        mask = torch.ones(x.shape[1], x.shape[1], dtype=torch.bool, device=x.device).tril()
        for layer in self.decoder:
            x, _ = layer(x, mask, memory)
        return self.norm(x) @ self.words.weight.mT

    @torch.no_grad()
    def write(self, memory: Float[Tensor, "b n w"], start: int, most: int) -> Int[Tensor, "b a"]:
        """The likeliest words, one after the other."""
        said = torch.full((len(memory), 1), start, device=memory.device)
        for _ in range(most):
            said = torch.cat([said, self(memory, said)[:, -1:].argmax(-1)], 1)
        return said[:, 1:]

    def _embedded(self, words: Int[Tensor, "b a"]) -> Float[Tensor, "b a w"]:
        at = torch.arange(words.shape[1], device=words.device)[:, None]
        return self.words(words) + place_waves(at, self.words.embedding_dim)
