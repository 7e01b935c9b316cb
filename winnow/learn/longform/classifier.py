"""A state-space classifier of long videos that reads chosen tokens alone: where Selective S4 learns to choose."""

from __future__ import annotations

import math
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, gelu, normalize

from winnow.parts.selective import Chooser, chosen, picked
from winnow.parts.state_space import Mixer

HEAT = 0.2  # of the contrast between short and long clips


class Layer(nn.Module):
    """A mixer and an MLP."""

    def __init__(self, width: int, states: int) -> None:
        super().__init__()
        self.mixer, self.norm = Mixer(width, states), nn.LayerNorm(width)
        self.up, self.down = nn.Linear(width, 2 * width), nn.Linear(2 * width, width)

    def forward(self, x: Float[Tensor, "b n c"]) -> Float[Tensor, "b n c"]:
        x = self.mixer(x)
        return x + self.down(gelu(self.up(self.norm(x))))


class Classifier(nn.Module):
    """Layers, and a linear head on each token; a class is as likely as the token that shows it best (log-mean-exp)."""

    def __init__(self, width: int, depth: int, states: int, classes: int) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Layer(width, states) for _ in range(depth))
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, classes)
        self.project, self.project_slow = nn.Linear(width, width), nn.Linear(width, width).requires_grad_(False)

    def forward(self, x: Float[Tensor, "b k c"]) -> Float[Tensor, "b y"]:
        for layer in self.layers:
            x = layer(x)
        return self.head(self.norm(x)).logsumexp(1) - math.log(x.shape[1])


class Selective(nn.Module):
    """A state-space classifier of long videos that reads the tokens its chooser keeps.

    Args:
        given: width of the tokens of a frozen encoder.
    """

    updates: Tensor

    def __init__(self, given: int, classes: int, width: int = 48, states: int = 8, depth: int = 2) -> None:
        super().__init__()
        self.choose = Chooser(given, width, states)
        self.classify = Classifier(width, depth, states, classes)
        self.register_buffer("updates", torch.zeros(()))

    def forward(
        self,
        tokens: Float[Tensor, "b n d"],
        place: Int[Tensor, "b n 3"],
        keep: int,
        noise: Float[Tensor, "b n"] | None = None,
        heat: float = 1.0,
    ) -> Float[Tensor, "b y"]:
        """Logits of classes.

        Args:
            keep: tokens that the layers read.
            noise: uniform from 0 to 1, while training: a token is then kept by chance, as its score has it.
            heat: of the gradient of choices.
        """
        x = self.choose.embed(tokens, place)
        if keep >= x.shape[1]:
            return self.classify(x)
        score = self.choose.score(x, x.new_ones(x.shape[:2]))
        kept, mask = chosen(score, keep, noise, heat)
        return self.classify(picked(x, kept) * mask[..., None])

    @torch.no_grad()
    def follow(self, momentum: float) -> None:
        """The guide and the slow projector come nearer to what they follow; at first at once."""
        m = min(momentum, float(self.updates / (self.updates + 10)))
        own: tuple[tuple[Any, Any], ...] = (
            (self.choose.guide, self.classify.layers[0].mixer),
            (self.classify.project_slow, self.classify.project),
        )
        for slow, fast in own:
            for a, b in zip(slow.parameters(), fast.parameters(), strict=True):
                a.copy_(m * a + (1 - m) * b)
        self.updates += 1

    def contrast(
        self,
        long: Float[Tensor, "b n d"],
        long_place: Int[Tensor, "b n 3"],
        short: Float[Tensor, "b m d"],
        short_place: Int[Tensor, "b m 3"],
    ) -> Float[Tensor, ""]:
        """How badly a short piece tells its own long clip from the others of a batch, and the other way round."""
        parts = []
        for query, query_place, key, key_place in (
            (short, short_place, long, long_place),
            (long, long_place, short, short_place),
        ):
            mixer: nn.Module = self.classify.layers[0].mixer  # type: ignore[assignment]
            q = self.classify.project(mixer(self.choose.embed(query, query_place)).mean(1))
            with torch.no_grad():
                k = self.classify.project_slow(self.choose.guide(self.choose.embed(key, key_place)).mean(1))
            alike = normalize(q, dim=-1) @ normalize(k, dim=-1).mT / HEAT
            parts.append(cross_entropy(alike, torch.arange(len(alike), device=alike.device)))
        return (parts[0] + parts[1]) / 2
