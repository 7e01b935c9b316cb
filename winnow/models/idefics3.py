"""Idefics3 and SmolVLM: square tiles of which a pixel shuffle merges patches.

Each tile, and the whole picture behind them, stands under a mark of its own in the prompt, so each is an item: a budget
of 64 tokens is 64 of each tile. A frame of a video is a picture; frames are one item where the caller names
their video.
"""

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from winnow.core.errors import UnsupportedError
from winnow.models.family import Encoding
from winnow.models.towers import MergedTiles, patch_size


class Idefics3(MergedTiles):
    name = "idefics3"
    model_types = ("idefics3", "smolvlm")
    tower = "vision_model"
    blocks = "vision_model.encoder.layers"
    projector = "connector"
    frames_apart = True
    tiles_apart = True

    def merge(self, model: Any) -> int:
        return model.config.scale_factor

    def lengths(self, model: Any, encoding: Encoding, pooled: Sequence[Tensor]) -> tuple[int, ...]:
        """A tile each; newer releases pool a row of the batch into one element."""
        tokens = self.side(model, encoding) ** 2
        return (tokens,) * (sum(x.reshape(-1, x.shape[-1]).shape[0] for x in pooled) // tokens)

    def tiles(self, model: Any, encoding: Encoding) -> Tensor:
        return encoding.inputs["pixel_values"].flatten(0, 1)[self.real(encoding)]

    def real(self, encoding: Encoding) -> Tensor:
        """`[rows · pictures]` which pictures are not only zeros: those are padding, and the model drops them."""
        real = (encoding.inputs["pixel_values"].flatten(0, 1) != 0).flatten(1).any(1)
        if len(encoding.lengths) > int(real.sum()):  # SmolVLM keeps one where all are padding
            real[0] = True
        return real

    def cells(self, model: Any, encoding: Encoding, values: Sequence[Tensor]) -> Tensor:
        mask = encoding.inputs.get("pixel_attention_mask")
        if mask is not None:
            size, shown = patch_size(model), mask.flatten(0, 1)[self.real(encoding)].bool()
            if not bool(shown.unfold(1, size, size).unfold(2, size, size).any(-1).any(-1).all()):
                raise UnsupportedError(
                    f"{type(model).__name__} got tiles with padding (pixel_attention_mask has patches of zeros), which "
                    "signals of the tower do not tell from pixels; let the processor resize pictures to full tiles, or "
                    "use a method that does not look at the tower."
                )
        return super().cells(model, encoding, values)
