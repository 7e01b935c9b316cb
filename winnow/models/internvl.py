"""InternVL and its kin: tiles of patches merged 2 × 2 by a pixel shuffle; [CLS] does not reach the language model.

The tiles of a picture stand in one unbroken run of placeholders and are one item, so that a budget is a picture's. Its
last tile is taken for the whole picture, as the processor makes it; the model is not told where the others lie, so
they have no boxes. A frame of a video is a picture of one tile; frames are one item where the caller names their
video.
"""

from typing import Any

from winnow.models.towers import MergedTiles


class InternVL(MergedTiles):
    name = "internvl"
    model_types = ("internvl",)
    blocks = "vision_tower.encoder.layer"
    attention = "attention"
    joined = True
    frames_apart = True

    def merge(self, model: Any) -> int:
        return round(1 / model.config.downsample_ratio)


class QianfanOCR(InternVL):
    name = "qianfan_ocr"
    model_types = ("qianfan_ocr",)
    blocks = "vision_tower.layers"
