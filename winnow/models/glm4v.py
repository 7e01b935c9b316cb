"""GLM-4.1V, GLM-4.5V, GLM-4.6V and GLM-OCR: any resolution, 2 × 2 patches joined by a convolution behind the blocks.

Frames of a video stand under the placeholder of pictures. The classes themselves tell both apart by what they are
given, and refuse a batch that has both.
"""

from winnow.models.patch_grids import PatchGrids


class Glm4V(PatchGrids):
    name = "glm4v"
    model_types = ("glm4v", "glm4v_moe", "glm46v", "glm_ocr")
    encoders = (
        ("get_image_features", "image", "image_token_id"),
        ("get_video_features", "video", "image_token_id"),
    )
