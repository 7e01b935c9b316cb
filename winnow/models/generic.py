"""Generic: the adapter of every class that has none of its own; its seams are found by looking at the model.

What cannot be seen is not claimed: which patches a token covers is known only where the tower's grid, or that grid
pooled, has as many cells as a picture has tokens.
"""

import math
from collections.abc import Sequence
from typing import Any

from torch import Tensor

from winnow.core.errors import UnsupportedError
from winnow.core.info import ModelInfo
from winnow.core.layout import Layout
from winnow.models.family import Encoding, Family

# (method of the base model, modality, names under which configurations have the id of its placeholder)
SEAMS = (
    ("get_image_features", "image", ("image_token_id", "image_token_index")),
    ("get_video_features", "video", ("video_token_id", "video_token_index")),
    ("get_audio_features", "audio", ("audio_token_id", "audio_token_index")),
)


class Generic(Family):
    """A family made for one model, from what is seen of it."""

    name = "generic"
    model_types = ()
    tower = blocks = projector = None
    points = ("projected", "layers")
    generic = True

    def __init__(self, model: Any) -> None:
        base = model.base_model
        seams = {}
        for method, modality, names in SEAMS:
            known = [name for name in names if isinstance(getattr(model.config, name, None), int)]
            if hasattr(base, method) and known:
                seams[modality] = (method, modality, known[0])
        self.encoders = tuple(seams.values())  # type: ignore[misc]
        self.mrope = hasattr(base, "get_rope_index")  # type: ignore[misc]

    def info(self, model: Any) -> ModelInfo:
        text = model.config.get_text_config()
        return ModelInfo(
            model=type(model).__name__,
            family=self.name,
            depth=len(model.get_decoder().layers),
            width=text.hidden_size,
            vision_depth=0,
            has_cls=False,
            points=self.points,
            mrope=self.mrope,
        )

    def layouts(self, model: Any, encoding: Encoding) -> tuple[Layout, ...]:
        side = patches_per_side(model)
        return tuple(grid_or_sequence(n, side) for n in encoding.lengths)

    def cells(self, model: Any, encoding: Encoding, values: Sequence[Tensor]) -> Tensor:
        raise UnsupportedError(
            f"the tower of {type(model).__name__} is not known; use a method that does not look at it."
        )


def patches_per_side(model: Any) -> int | None:
    """Patches along one side of a picture of fixed size; None where sizes vary or are not known."""
    vision = getattr(model.config, "vision_config", None)
    size, patch = getattr(vision, "image_size", None), getattr(vision, "patch_size", None)
    return size // patch if isinstance(size, int) and isinstance(patch, int) else None


def grid_or_sequence(n: int, side: int | None) -> Layout:
    """The grid of a tower with `side` patches along a side, or that grid pooled to n cells; else a row of n tokens."""
    root = math.isqrt(n)
    known = side is not None and root * root == n and root > 1 and side % root == 0
    return Layout.grid(root, root) if known else Layout.sequence(n)
