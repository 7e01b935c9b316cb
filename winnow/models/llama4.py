"""Llama 4 on transformers 5.19: tiles of one size, each an item; 2 × 2 patches to a token by pixel shuffle.

A picture of several tiles is several items, the whole picture among them, because the encoder is not told which tiles
belong together. Its tower is not looked at. Newer versions (5.24) cannot run the class at all.
"""

from typing import Any

from winnow.core.errors import UnsupportedError
from winnow.core.info import ModelInfo
from winnow.core.layout import Layout
from winnow.models.family import Encoding, Family


class Llama4(Family):
    name = "llama4"
    model_types = ("llama4",)
    tower = blocks = projector = None
    tiles_apart = True
    points = ("projected", "layers")

    def check_prompt(self, model: Any, tokens: int) -> None:
        text = model.config.get_text_config()
        if text.attn_temperature_tuning and not all(text.no_rope_layers) and tokens >= text.floor_scale:
            raise UnsupportedError(
                f"layers of {type(model).__name__} without rotary positions scale their queries by the place of a "
                f"token in the cache from {text.floor_scale} tokens on, which dropping moves; this prompt has "
                f"{tokens}. Use shorter prompts, or handle.using('full')."
            )

    def rows(self, output: Any) -> Any:
        """What the tower gives; the class projects it row by row in its own forward."""
        return getattr(output, "last_hidden_state", None)

    def info(self, model: Any) -> ModelInfo:
        text = model.config.get_text_config()
        return ModelInfo(
            model=type(model).__name__,
            family=self.name,
            depth=text.num_hidden_layers,
            width=text.hidden_size,
            vision_depth=0,
            has_cls=False,
            points=self.points,
            merge=self.merge(model),
        )

    def merge(self, model: Any) -> int:
        """Patches along a side of a token."""
        return round(1 / model.config.vision_config.pixel_shuffle_ratio)

    def layouts(self, model: Any, encoding: Encoding) -> tuple[Layout, ...]:
        vision = model.config.vision_config
        side = vision.image_size // vision.patch_size // self.merge(model)
        return (Layout.grid(side, side),) * len(encoding.lengths)
