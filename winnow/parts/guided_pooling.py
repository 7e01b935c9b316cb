"""Learned pooling that an instruction guides (HICom): blocks of tokens become one each, and a few queries read all.

Everything learned of the local branch starts as if it were not there (gates of 0): tokens are pooled by how alike they
are to the instruction.
"""

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn
from torch.nn.functional import gelu, layer_norm, normalize


class Adapter(nn.Module):
    """(1 − α) x + α LN(MLP(x)) with a learned α that starts at 0."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.up, self.down, self.norm = nn.Linear(width, width), nn.Linear(width, width), nn.LayerNorm(width)
        self.gate = nn.Parameter(torch.zeros(1))

    def forward(self, x: Float[Tensor, "*shape d"]) -> Float[Tensor, "*shape d"]:
        return x + self.gate * (self.norm(self.down(gelu(self.up(x)))) - x)


class Guide(nn.Module):
    """A query that an instruction scales and shifts: LN(q · (1 + scale) + shift)."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.up, self.down, self.norm = nn.Linear(width, width), nn.Linear(width, 2 * width), nn.LayerNorm(width)

    def forward(self, q: Float[Tensor, "b m d"], g: Float[Tensor, "b d"]) -> Float[Tensor, "b m d"]:
        scale, shift = self.down(gelu(self.up(g)))[:, None].chunk(2, -1)
        return self.norm(q * (1 + scale) + shift)


class Local(nn.Module):
    """Attention pooling in blocks, by a query of the instruction.

    Args:
        coarse: whether the mean of a block, guided, asks for it; else the instruction itself does.
    """

    def __init__(self, width: int, coarse: bool) -> None:
        super().__init__()
        self.text, self.key, self.value, self.readout = (Adapter(width) for _ in range(4))
        self.guide = Guide(width) if coarse else None

    def forward(
        self,
        x: Float[Tensor, "b w s d"],
        there: Bool[Tensor, "b w s"],
        scale: Float[Tensor, ""],
        g: Float[Tensor, "b e"],
        keys: Float[Tensor, "b w s e"] | None = None,
    ) -> tuple[Float[Tensor, "b w d"], Float[Tensor, "b w s"]]:
        """The outputs, and the weights of each block, which sum to 1.

        Args:
            x: zeros where nothing is there.
            scale: of cosines; of 0, products over the root of the width are taken.
            g: the instruction.
            keys: in another space, that of the instruction, in which nothing is learned.
        """
        asked = g[:, None]
        if keys is None:
            keys, asked = self.key(x), self.text(asked)
            if self.guide is not None:
                asked = self.guide(x.sum(2) / there.sum(2).clamp_min(1)[..., None], asked[:, 0])
        weights = attention(asked[:, :, None], keys, there[:, :, None], scale)[:, :, 0]
        return self.readout((weights[..., None] * self.value(x)).sum(2)), weights


class Global(nn.Module):
    """Learned queries, guided by the instruction, that attend to all tokens and to where they are."""

    def __init__(self, width: int, queries: int) -> None:
        super().__init__()
        self.heads = max(1, width // 128)
        inner = self.heads * (width // self.heads)
        self.queries, self.guide = nn.Parameter(torch.zeros(queries, width)), Guide(width)
        self.q, self.kv, self.out = nn.Linear(width, inner), nn.Linear(width, 2 * inner), nn.Linear(inner, width)
        self.up, self.down = nn.Linear(width, width), nn.Linear(width, width)

    def forward(
        self,
        x: Float[Tensor, "b n d"],
        where: Float[Tensor, "n d"],
        there: Bool[Tensor, "b n"],
        g: Float[Tensor, "b d"],
    ) -> tuple[Float[Tensor, "b q d"], Float[Tensor, "b q n"]]:
        """The outputs, and the weights of each query, mean over the heads."""
        asked = self.guide(self.queries.expand(len(x), -1, -1), g)
        seen = layer_norm(x, x.shape[-1:]) + where
        k, v = self.kv(seen).unflatten(-1, (2, self.heads, -1)).permute(2, 0, 3, 1, 4)
        q = self.q(asked).unflatten(-1, (self.heads, -1)).transpose(1, 2)
        weights = attention(q, k, there[:, None, None], q.new_zeros(()))
        read = asked + self.out((weights @ v).transpose(1, 2).flatten(2))
        return self.down(gelu(self.up(read))), weights.mean(1)


class Connector(nn.Module):
    """Both branches."""

    def __init__(self, width: int, queries: int, coarse: bool) -> None:
        super().__init__()
        self.local = Local(width, coarse)
        self.overall = Global(width, queries)


def attention(
    q: Float[Tensor, "*#shape m d"], k: Float[Tensor, "*#shape n d"], there: Bool[Tensor, "*#shape #m n"], scale: Tensor
) -> Float[Tensor, "*#shape m n"]:
    """Weights that sum to 1 over the keys that are there: of cosines times a scale, or, of 0, of scaled products."""
    products = q @ k.mT * q.shape[-1] ** -0.5
    cosines = normalize(q, dim=-1) @ normalize(k, dim=-1).mT * scale
    logits = torch.where(scale > 0, cosines, products)
    return logits.masked_fill(~there, torch.finfo(logits.dtype).min).softmax(-1)
