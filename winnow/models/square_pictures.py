"""SquarePictures: what Gemma 3 and PaliGemma share: each picture of one size, a SigLIP tower, a grid of tokens."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import unfold

from winnow.core.errors import UnsupportedError
from winnow.core.info import ModelInfo
from winnow.core.layout import Layout
from winnow.models.family import Encoding, Family, seam, token_starts


class SquarePictures(Family):
    """A family whose tokens are the patches of a square tower, or squares of pooled patches."""

    def kernel(self, model: Any) -> int:
        """Patches along a side of a token."""
        return 1

    def side(self, model: Any) -> int:
        """Tokens along a side of a picture."""
        vision = model.config.vision_config
        return vision.image_size // vision.patch_size // self.kernel(model)

    def check(self, model: Any) -> None:
        vision = model.config.vision_config
        patches, kernel = vision.image_size // vision.patch_size, self.kernel(model)
        if patches % kernel:
            raise UnsupportedError(
                f"{type(model).__name__} pools {patches} × {patches} patches by {kernel}, which leaves some of them "
                f"out; supported are configurations in which the pooled size divides the patches of a side."
            )

    def info(self, model: Any) -> ModelInfo:
        text, vision = model.config.get_text_config(), model.config.vision_config
        return ModelInfo(
            model=type(model).__name__,
            family=self.name,
            depth=text.num_hidden_layers,
            width=text.hidden_size,
            vision_width=vision.hidden_size,
            vision_depth=len(seam(model.base_model, self.blocks, model)),
            feature_layer=-1,
            has_cls=False,
            points=self.points,
            merge=self.kernel(model),
        )

    def layouts(self, model: Any, encoding: Encoding) -> tuple[Layout, ...]:
        side = self.side(model)
        layout = Layout.grid(side, side)
        if any(n != layout.n for n in encoding.lengths):
            raise UnsupportedError(
                f"{type(model).__name__} gave pictures of {encoding.lengths} tokens where {layout.n} were expected."
            )
        return (layout,) * len(encoding.lengths)

    def cells(self, model: Any, encoding: Encoding, values: Sequence[Tensor]) -> Tensor:
        """Blocks give a row for each patch, of which a token has the mean; the projector one for each token."""
        side, kernel = self.side(model), self.kernel(model)
        return torch.cat([_pooled(x, side, kernel) for x in values])

    def patches(self, model: Any, encoding: Encoding) -> Tensor:
        size = model.config.vision_config.patch_size * self.kernel(model)
        pixels = encoding.inputs["pixel_values"].float()
        return unfold(pixels, size, stride=size).transpose(1, 2).flatten(0, 1)

    def cell_starts(self, model: Any, encoding: Encoding) -> tuple[int, ...]:
        return token_starts(encoding)


def _pooled(values: Tensor, side: int, kernel: int) -> Tensor:
    """`[pictures, patches or tokens, …]` → `[pictures · tokens, …]`."""
    if values.shape[1] == side * side:
        return values.flatten(0, 1)
    squares = values.unflatten(1, (side, kernel, side, kernel))
    return squares.mean((2, 4)).flatten(0, 2)
