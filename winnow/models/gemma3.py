"""Gemma 3 and ShieldGemma 2: square pictures, pooled to 16 × 16 tokens; a picture's tokens see each other.

Pan and scan gives crops of a picture as pictures of their own, which they are here too.
"""

from typing import Any

from winnow.models.square_pictures import SquarePictures


class Gemma3(SquarePictures):
    name = "gemma3"
    model_types = ("gemma3", "shieldgemma2")
    # The projector pools squares of patches, so single patches cannot leave before it.
    points = ("projected", "layers")

    def kernel(self, model: Any) -> int:
        vision = model.config.vision_config
        return vision.image_size // vision.patch_size // int(model.config.mm_tokens_per_image**0.5)
