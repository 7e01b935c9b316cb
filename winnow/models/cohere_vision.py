"""Aya Vision and Command A Vision: square tiles of which the connector merges 2 × 2 patches.

Each tile has a mark of its own in the prompt, so each is an item: a budget of 64 tokens is 64 of each tile.
"""

from typing import Any

from winnow.models.towers import MergedTiles


class CohereVision(MergedTiles):
    name = "cohere_vision"
    model_types = ("aya_vision", "cohere2_vision")
    tiles_apart = True

    def merge(self, model: Any) -> int:
        return model.config.downsample_factor
