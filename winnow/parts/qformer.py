"""A small Q-Former: learned queries that read a sequence with a text in mind."""

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn.functional import gelu

EVERY = 2  # layers from one that reads to the next


class Attention(nn.Module):
    """Attention of some rows to others, which may be of another width."""

    def __init__(self, dim: int, heads: int, given: int | None = None) -> None:
        super().__init__()
        given = dim if given is None else given
        self.heads = heads
        self.q, self.k, self.v, self.out = (nn.Linear(w, dim) for w in (dim, given, given, dim))

    def forward(self, x: Float[Tensor, "b n d"], to: Float[Tensor, "b m w"]) -> tuple[Tensor, Tensor]:
        """`[b, n, d]` and the weights `[b, n, m]`, mean over heads."""
        q = self.q(x).unflatten(-1, (self.heads, -1)).transpose(1, 2)
        k = self.k(to).unflatten(-1, (self.heads, -1)).permute(0, 2, 3, 1)
        v = self.v(to).unflatten(-1, (self.heads, -1)).transpose(1, 2)
        weights = (q @ k / q.shape[-1] ** 0.5).softmax(-1)
        return self.out((weights @ v).transpose(1, 2).flatten(2)), weights.mean(1)


class Layer(nn.Module):
    """Queries and text attend to each other; then, in every second layer, the queries read; then an MLP for each."""

    def __init__(self, dim: int, heads: int, given: int | None) -> None:
        super().__init__()
        self.own = Attention(dim, heads)
        self.cross = None if given is None else Attention(dim, heads, given)
        self.norms = nn.ModuleList(nn.LayerNorm(dim) for _ in range(3))
        self.up, self.down = nn.Linear(dim, 2 * dim), nn.Linear(2 * dim, dim)

    def forward(self, x: Tensor, queries: int, given: Tensor) -> tuple[Tensor, Tensor | None]:
        rows = self.norms[0](x)
        x, weights = x + self.own(rows, rows)[0], None
        if self.cross is not None:
            read, weights = self.cross(self.norms[1](x[:, :queries]), given)
            x = torch.cat([x[:, :queries] + read, x[:, queries:]], 1)
        return x + self.down(gelu(self.up(self.norms[2](x)))), weights


class QFormer(nn.Module):
    """Queries that read a sequence; every second layer from the first on does.

    Args:
        width: of the sequence that is read, and of the text.
    """

    def __init__(self, width: int, dim: int, heads: int, queries: int, depth: int) -> None:
        super().__init__()
        self.queries, self.text = nn.Parameter(torch.zeros(queries, dim)), nn.Linear(width, dim)
        self.norm_given, self.norm_text, self.norm = nn.LayerNorm(width), nn.LayerNorm(width), nn.LayerNorm(dim)
        self.layers = nn.ModuleList(Layer(dim, heads, None if i % EVERY else width) for i in range(depth))

    def forward(
        self,
        given: Float[Tensor, "b n w"],
        text: Float[Tensor, "b m w"],
        place: Float[Tensor, "b n w"] | None = None,
        count: int | None = None,
    ) -> tuple[Float[Tensor, "b q d"], Float[Tensor, "b q n"]]:
        """What the first `count` queries found, and how the last layer that reads attended, mean over heads.

        Args:
            place: is added to what is read, once that is normalised.
        """
        queries = self.queries[:count].expand(len(given), -1, -1)
        x = torch.cat([queries, self.text(self.norm_text(text))], 1)
        given, seen = self.norm_given(given) if place is None else self.norm_given(given) + place, given.new_zeros(())
        for layer in self.layers:
            x, weights = layer(x, queries.shape[1], given)
            seen = seen if weights is None else weights
        return self.norm(x[:, : queries.shape[1]]), seen
