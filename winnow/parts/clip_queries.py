"""A few learned queries read each short clip of a video; what they read is joined over all clips (OmniVid)."""

from collections.abc import Sequence

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from torch.nn.functional import layer_norm

from winnow.parts.transformer import Layer, place_waves


class ClipQueries(nn.Module):
    """Queries in each clip, and layers in which those of all clips attend to each other.

    Args:
        given: width of the tokens, in which they also leave.
        queries: at most; the first ones alone are a smaller set of the same (trained with any number).
        depth, fusion: layers of a clip, and over clips.
    """

    def __init__(
        self, given: int, width: int = 96, queries: int = 8, depth: int = 2, fusion: int = 1, heads: int = 4
    ) -> None:
        super().__init__()
        self.enter, self.leave = nn.Linear(given, width), nn.Linear(width, given)
        self.queries = nn.Parameter(torch.zeros(queries, width))
        self.former = nn.ModuleList(Layer(width, heads, cross=True) for _ in range(depth))
        self.fusion = nn.ModuleList(Layer(width, heads) for _ in range(fusion))
        self.norm = nn.LayerNorm(width)

    def read(
        self,
        clips: Float[Tensor, "b c s d"],
        place: Int[Tensor, "b c s 3"],
        there: Bool[Tensor, "b c s"],
        counts: Sequence[int],
    ) -> tuple[Float[Tensor, "b m w"], Float[Tensor, "b c q s"]]:
        """What the queries have read, clip behind clip, and the attention of each to the tokens of its clip.

        Args:
            place: frame of the clip, row and column of each token.
            there: which tokens there are; clips of unequal length are filled up.
            counts: queries of each clip.
        """
        b, c = clips.shape[:2]
        x = self.enter(layer_norm(clips, clips.shape[-1:])) + place_waves(place, self.queries.shape[1])
        q = self.queries[: max(counts)].expand(b * c, -1, -1)
        within = torch.ones(q.shape[1], q.shape[1], dtype=torch.bool, device=q.device).tril()
        mask = there.flatten(0, 1)[:, None].expand(-1, q.shape[1], -1)
        weights = x.new_zeros(0)
        for layer in self.former:
            q, weights = layer(q, within, x.flatten(0, 1), mask)
        own = torch.tensor([i * q.shape[1] + j for i, count in enumerate(counts) for j in range(count)])
        when = place_waves(torch.arange(c, device=q.device)[:, None], q.shape[-1])
        q = (q.unflatten(0, (b, c)) + when[:, None].to(q.dtype)).flatten(1, 2)[:, own.to(q.device)]
        for layer in self.fusion:
            q, _ = layer(q)
        return self.norm(q), weights.mean(1).unflatten(0, (b, c))

    def forward(
        self,
        clips: Float[Tensor, "b c s d"],
        place: Int[Tensor, "b c s 3"],
        there: Bool[Tensor, "b c s"],
        counts: Sequence[int],
    ) -> tuple[Float[Tensor, "b m d"], Float[Tensor, "b c q s"]]:
        """The same in the width of the tokens, on top of what each query attends to."""
        q, weights = self.read(clips, place, there, counts)
        seen = weights @ clips
        return torch.cat([seen[:, c, :k] for c, k in enumerate(counts)], 1) + self.leave(q), weights
