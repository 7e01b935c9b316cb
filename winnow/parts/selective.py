"""Tokens chosen by what a linear mixer makes of all of them (Selective S4), and the classifier that teaches it.

A slow copy of the classifier's first state-space layer reads all tokens; a small net scores what it gives. The layers
of the classifier read the best tokens alone.
"""

import math

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, gelu, layer_norm, normalize

from winnow.core.select import ranked
from winnow.parts.history import TokenScores
from winnow.parts.state_space import Mixer

HEAT = 0.2  # of the contrast between short and long clips


class Chooser(nn.Module):
    """Scores tokens by a mixer that follows another one.

    Args:
        given: width of the tokens.
        width: of its own.
    """

    def __init__(self, given: int, width: int, states: int) -> None:
        super().__init__()
        self.enter = nn.Linear(given, width)
        self.guide = Mixer(width, states).requires_grad_(False)
        self.judge = TokenScores(width)

    def embed(self, tokens: Float[Tensor, "b n d"], place: Int[Tensor, "b n 3"]) -> Float[Tensor, "b n c"]:
        """Tokens in its own width, with their frame, row and column."""
        x = self.enter(layer_norm(tokens, tokens.shape[-1:]))
        return x + waves_of(place.to(x.dtype), x.shape[-1])

    def score(self, x: Float[Tensor, "b n c"], sound: Float[Tensor, "b n"]) -> Float[Tensor, "b n"]:
        """By how much a token's logit of being kept is above that of being dropped."""
        keep, drop = self.judge(self.guide(x * sound[..., None]).detach(), sound).unbind(-1)
        return keep - drop

    def forward(
        self, tokens: Float[Tensor, "b n d"], place: Int[Tensor, "b n 3"], sound: Bool[Tensor, "b n"]
    ) -> Float[Tensor, "b n"]:
        """Scores of tokens, of which those that are not sound count for none of the others."""
        x = self.embed(tokens, place)
        return self.score(x, sound.to(x.dtype))


def waves_of(place: Float[Tensor, "b n 3"], width: int) -> Float[Tensor, "b n c"]:
    """Sines and cosines of frame, row and column, a third of the width each."""
    bands = width // 6
    angles = (place[..., None] * 0.1 ** (torch.arange(bands, device=place.device) / bands * 2)).flatten(-2)
    waves = torch.cat([angles.sin(), angles.cos()], -1)
    return nn.functional.pad(waves, (0, width - waves.shape[-1]))


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
    """Layers, their mean over tokens, and a linear head."""

    def __init__(self, width: int, depth: int, states: int, classes: int) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Layer(width, states) for _ in range(depth))
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, classes)
        self.project, self.project_slow = nn.Linear(width, width), nn.Linear(width, width).requires_grad_(False)

    def forward(self, x: Float[Tensor, "b k c"]) -> Float[Tensor, "b y"]:
        for layer in self.layers:
            x = layer(x)
        return self.head(self.norm(x).mean(1))


class Selective(nn.Module):
    """A state-space classifier of long videos that reads the tokens its chooser keeps.

    Args:
        given: width of the tokens of a frozen encoder.
    """

    updates: Tensor

    def __init__(self, given: int, width: int = 48, depth: int = 2, states: int = 8, classes: int = 1) -> None:
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
        own: tuple[tuple[nn.Module, nn.Module], ...] = (
            (self.choose.guide, self.classify.layers[0].mixer),  # type: ignore[arg-type]
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


def chosen(
    score: Float[Tensor, "b n"], keep: int, noise: Float[Tensor, "b n"] | None = None, heat: float = 1.0
) -> tuple[Int[Tensor, "b k"], Float[Tensor, "b k"]]:
    """The best tokens in their order, and for each a 1 with the gradient of its chance to be kept.

    Args:
        noise: uniform from 0 to 1; the difference of two Gumbel noises, those of keeping and dropping, is logistic.
    """
    if noise is not None:
        noise = noise.clamp(1e-6, 1 - 1e-6)
        score = score + noise.log() - (-noise).log1p()
    kept = ranked(score.detach())[:, :keep].sort(1).values
    chance = (score.gather(1, kept) / heat).sigmoid()
    return kept, 1 + chance - chance.detach()


def picked(x: Float[Tensor, "b n c"], kept: Int[Tensor, "b k"]) -> Float[Tensor, "b k c"]:
    return x.gather(1, kept[..., None].expand(-1, -1, x.shape[-1]))


def cooled(step: float) -> float:
    """The heat at a share of the training: from 1 to 0.5."""
    return math.exp(math.log(0.5) * step)
