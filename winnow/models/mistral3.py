"""Mistral 3 and LightOnOCR: a Pixtral tower for pictures of any size, of which the connector merges 2 × 2 patches.

The tower attends to all pictures of a call in one sequence, under a mask that keeps each to itself.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from winnow.core.errors import UnsupportedError
from winnow.core.layout import Layout
from winnow.models.family import Encoding
from winnow.models.towers import KnownTower, check_lengths, merged, patch_size, unfolded


class Mistral3(KnownTower):
    name = "mistral3"
    model_types = ("mistral3",)
    blocks = "vision_tower.transformer.layers"
    attention = "attention"

    def merge(self, model: Any) -> int:
        return model.config.spatial_merge_size

    def grids(self, model: Any, encoding: Encoding) -> tuple[tuple[int, int], ...]:
        """Patches down and across each picture."""
        sizes, patch = encoding.inputs.get("image_sizes"), patch_size(model)
        if sizes is None:
            raise UnsupportedError(
                f"{type(model).__name__} needs image_sizes beside pixel_values; the processor gives both."
            )
        return tuple((int(h) // patch, int(w) // patch) for h, w in torch.as_tensor(sizes).tolist())

    def layouts(self, model: Any, encoding: Encoding) -> tuple[Layout, ...]:
        merge = self.merge(model)
        found = tuple(Layout.grid(h // merge, w // merge) for h, w in self.grids(model, encoding))
        check_lengths(model, encoding, tuple(layout.n for layout in found))
        return found

    def windows(self, model: Any, encoding: Encoding, tokens: int) -> tuple[int, ...]:
        """Where a mask keeps pictures apart, they come one by one; FlashAttention knows them by their positions."""
        own = tuple(h * w for h, w in self.grids(model, encoding))
        return own if sum(own) == tokens else (tokens,)

    def cells(self, model: Any, encoding: Encoding, values: Sequence[Tensor]) -> Tensor:
        rows = torch.cat([x.flatten(0, 1) for x in values])
        if rows.shape[0] == sum(encoding.lengths):
            return rows
        grids = self.grids(model, encoding)
        pictures = rows.split([h * w for h, w in grids])
        return torch.cat(
            [merged(own[None], h, w, self.merge(model))[0] for own, (h, w) in zip(pictures, grids, strict=True)]
        )

    def patches(self, model: Any, encoding: Encoding) -> Tensor:
        patch, pixels = patch_size(model), encoding.inputs["pixel_values"]
        shown = [
            own[:, : h * patch, : w * patch] for own, (h, w) in zip(pixels, self.grids(model, encoding), strict=True)
        ]
        return torch.cat([unfolded(own[None], patch * self.merge(model))[0] for own in shown])


class LightOnOcr(Mistral3):
    name = "lighton_ocr"
    model_types = ("lighton_ocr",)
    tower = "vision_encoder"
    blocks = "vision_encoder.transformer.layers"
    projector = "vision_projection"
