"""Tokens chosen by what a linear mixer makes of all of them (Selective S4).

The mixer follows, with momentum, one that is trained elsewhere; a small net scores what it gives.
"""

import math

from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from torch.nn.functional import layer_norm

from winnow.core.select import ranked
from winnow.parts.history import TokenScores
from winnow.parts.state_space import Mixer
from winnow.parts.transformer import place_waves


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
        return x + place_waves(place, x.shape[-1]).to(x.dtype)

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
