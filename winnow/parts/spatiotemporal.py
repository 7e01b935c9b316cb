"""A learned module for videos ahead of a projector: frames see one another, tokens those of their frame (KFFocus).

Of the paper only its abstract is known, so the form is this file's: embeddings of time, row and column are added; one
attention over the means of frames, and one over the tokens of each frame, are added to what goes in. Their last layers
start at zero, so that an untrained module changes nothing.
"""

import torch
from jaxtyping import Float
from torch import Tensor, nn

from winnow.core.errors import WinnowError


class SpatioTemporal(nn.Module):
    """`[b, t, h, w, d]` → the same shape.

    Args:
        width: of tokens.
        sizes: the most frames, rows and columns.
        heads: of both attentions.
    """

    def __init__(self, width: int, sizes: tuple[int, int, int], heads: int = 8) -> None:
        super().__init__()
        if width % heads:
            raise WinnowError(f"width={width} is no multiple of heads={heads}; choose heads that divide it.")
        self.sizes = sizes
        self.at = nn.ParameterList([nn.Parameter(torch.zeros(n, width)) for n in sizes])
        self.norms = nn.ModuleList([nn.LayerNorm(width) for _ in range(2)])
        self.over_frames, self.in_frame = (nn.MultiheadAttention(width, heads, batch_first=True) for _ in range(2))
        for attention in (self.over_frames, self.in_frame):
            nn.init.zeros_(attention.out_proj.weight)
            nn.init.zeros_(attention.out_proj.bias)

    def forward(self, x: Float[Tensor, "b t h w d"]) -> Float[Tensor, "b t h w d"]:
        shape = tuple(x.shape[1:4])
        if any(got > most for got, most in zip(shape, self.sizes, strict=True)):
            raise WinnowError(f"the clip has {shape} frames, rows and columns; this module was made for {self.sizes}.")
        time, row, column = (table[:n] for table, n in zip(self.at, shape, strict=True))
        x = x + time[:, None, None] + row[:, None] + column
        frames = self.norms[0](x.mean((2, 3)))
        x = x + self.over_frames(frames, frames, frames, need_weights=False)[0][:, :, None, None]
        tokens = self.norms[1](x.flatten(0, 1).flatten(1, 2))
        return x + self.in_frame(tokens, tokens, tokens, need_weights=False)[0].view_as(x)
