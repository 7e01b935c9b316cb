"""Pre-norm transformer layers of small learned parts, which show what they attend to."""

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn
from torch.nn.functional import gelu


class Attention(nn.Module):
    """Rows that read others, or each other."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.q, self.kv, self.out = nn.Linear(width, width), nn.Linear(width, 2 * width), nn.Linear(width, width)

    def forward(
        self, x: Float[Tensor, "b m d"], read: Float[Tensor, "b n d"], mask: Bool[Tensor, "*lanes m n"] | None = None
    ) -> tuple[Float[Tensor, "b m d"], Float[Tensor, "b h m n"]]:
        """What they become, and the attention of each head. Where a row may read nothing, it reads all alike."""
        q = self.q(x).unflatten(-1, (self.heads, -1)).transpose(1, 2)
        k, v = self.kv(read).unflatten(-1, (2, self.heads, -1)).permute(2, 0, 3, 1, 4)
        logits = q @ k.mT / q.shape[-1] ** 0.5
        if mask is not None:
            logits = logits.masked_fill(~(mask[:, None] if mask.ndim == 3 else mask), torch.finfo(logits.dtype).min)
        weights = logits.softmax(-1)
        return self.out((weights @ v).transpose(1, 2).flatten(2)), weights


class Layer(nn.Module):
    """Attention to each other, then to a context where there is one, and an MLP.

    Args:
        cross: whether there is a context.
    """

    def __init__(self, width: int, heads: int, cross: bool = False) -> None:
        super().__init__()
        self.norm, self.attend = nn.LayerNorm(width), Attention(width, heads)
        self.cross_norm = nn.LayerNorm(width) if cross else nn.Identity()
        self.cross = Attention(width, heads) if cross else None
        self.last_norm, self.up, self.down = (
            nn.LayerNorm(width),
            nn.Linear(width, 2 * width),
            nn.Linear(2 * width, width),
        )

    def forward(
        self,
        x: Float[Tensor, "b m d"],
        mask: Bool[Tensor, "*own m m"] | None = None,
        context: Float[Tensor, "b n d"] | None = None,
        context_mask: Bool[Tensor, "*lanes m n"] | None = None,
    ) -> tuple[Float[Tensor, "b m d"], Float[Tensor, "b h m n"]]:
        """The rows, and the attention to the context; without one, to each other."""
        own = self.norm(x)
        read, weights = self.attend(own, own, mask)
        x = x + read
        if self.cross is not None and context is not None:
            read, weights = self.cross(self.cross_norm(x), context, context_mask)
            x = x + read
        return x + self.down(gelu(self.up(self.last_norm(x)))), weights


def place_waves(place: Tensor, width: int) -> Float[Tensor, "*shape c"]:
    """Sines and cosines of whole numbers, an equal part of the width for each of the last axis."""
    bands = width // (2 * place.shape[-1])
    angles = (place.float()[..., None] * 0.01 ** (torch.arange(bands, device=place.device) / bands)).flatten(-2)
    waves = torch.cat([angles.sin(), angles.cos()], -1)
    return nn.functional.pad(waves, (0, width - waves.shape[-1]))
