"""Generic: the adapter of every class that has none of its own; its seams are found by looking at the model.

What cannot be seen is not claimed: which patches a token covers is known only where the tower's grid, or that grid
pooled, has as many cells as a picture has tokens.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any, ClassVar

from torch import Tensor

from winnow.core.errors import UnsupportedError
from winnow.core.layout import Layout
from winnow.models.family import Encoding, Family, decoder_of

# (method of the base model, modality, names under which configurations have the id of its placeholder)
SEAMS = (
    ("get_image_features", "image", ("image_token_id", "image_token_index")),
    ("get_video_features", "video", ("video_token_id", "video_token_index")),
)

# Classes that have the seams and yet cannot work, with the reason.
_GENERATES_ALONE = "its generate calls the language model directly, past the forward in which pictures are placed"
_BY_PLACE = "some of its layers choose what they read by the places of keys in the cache, which dropping moves"
CANNOT = {
    "blip-2": _GENERATES_ALONE,
    "instructblip": _GENERATES_ALONE,
    "instructblipvideo": _GENERATES_ALONE,
    "chameleon": "it has no language model of its own inside: one forward places pictures, makes masks and runs layers",
    "kosmos-2": "pictures are placed inside its language model, by a mask of positions and not by a placeholder",
    "kosmos-2.5": "pictures are placed inside its language model, by a mask of positions and not by a placeholder",
    "glm5_next": _BY_PLACE,
    "qwen4_exp": _BY_PLACE,
    "minimax_m3_vl": _BY_PLACE,
    "inkling_mm_model": "its layers take distances between tokens from their places in the cache, which dropping moves",
    "granite4_vision": "its language model adds features to the whole sequence between layers, in its own forward",
    "idefics": "its pictures are read through cross-attention, and are not in the language model's sequence",
    "diffusion_gemma": "it writes a canvas by diffusion with a second decoder, and its generate is not token by token",
}

# Classes whose encoder may give all pictures of a sample as one element (transformers 5.24 does): rows of each picture.
ROWS: dict[str, Callable[[Any], int]] = {"idefics2": lambda config: config.perceiver_config.resampler_n_latents}


class Generic(Family):
    """A family made for one model, from what is seen of it.

    Args:
        model: a model that `fits`.
        points: where its checks have passed.
    """

    name = "generic"
    model_types = ()
    tower = blocks = projector = None
    points: ClassVar[tuple[str, ...]] = ("projected", "layers")
    generic = True
    tiles_apart = True

    def __init__(self, model: Any, points: tuple[str, ...]) -> None:
        self.encoders = _encoders(model)  # type: ignore[misc]
        self.points = points  # type: ignore[misc]
        self.mrope = hasattr(model.base_model, "get_rope_index")  # type: ignore[misc]
        self.axes = _axes(model.config.get_text_config())  # type: ignore[misc]

    @staticmethod
    def fits(model: Any) -> bool:
        """Whether a model has the seams."""
        return not Generic.why_not(model)

    @staticmethod
    def why_not(model: Any) -> str:
        """What keeps a model from being compressed through this adapter; empty if nothing is seen."""
        config = getattr(model, "config", None)
        kind = getattr(config, "model_type", None)
        if kind in CANNOT:
            return CANNOT[kind]
        if getattr(config, "is_encoder_decoder", False):
            return "it is an encoder and a decoder, and its pictures are not in the decoder's sequence"
        if not hasattr(model, "get_decoder") or not hasattr(model, "base_model"):
            return "it is not a vision-language model of transformers"
        if not _encoders(model):
            methods = " or ".join(name for name, *_ in SEAMS)
            return f"its base model has no {methods} with a placeholder id in the configuration"
        if decoder_of(model) is None:
            return "its language model has no list of layers"
        return ""

    def rows(self, output: Any) -> Any:
        found = getattr(output, "pooler_output", None)
        found = getattr(output, "last_hidden_state", None) if found is None else found
        return found[None] if isinstance(found, Tensor) and found.ndim == 2 else found

    def lengths(self, model: Any, encoding: Encoding, pooled: Sequence[Tensor]) -> tuple[int, ...]:
        found = super().lengths(model, encoding, pooled)
        known = ROWS.get(model.config.model_type)
        return (known(model.config),) * (sum(found) // known(model.config)) if known else found

    def layouts(self, model: Any, encoding: Encoding) -> tuple[Layout, ...]:
        side = patches_per_side(model)
        return tuple(grid_or_sequence(n, side) for n in encoding.lengths)

    def check(self, model: Any) -> None:
        if reason := self.why_not(model):
            raise UnsupportedError(f"{type(model).__name__} is not supported: {reason}.")


def _encoders(model: Any) -> tuple[tuple[str, str, str], ...]:
    """The methods that encode, each with its modality and the name of the placeholder id in the configuration."""
    found = []
    for method, modality, names in SEAMS:
        known = [name for name in names if isinstance(getattr(model.config, name, None), int)]
        if hasattr(model.base_model, method) and known:
            found.append((method, modality, known[0]))
    return tuple(found)


def _axes(text: Any) -> int:
    """Axes of positions: the sections into which a rotary embedding is divided, else time, height and width."""
    rope = getattr(text, "rope_parameters", None) or {}
    sections = [value for name, value in rope.items() if name.endswith("section") and isinstance(value, list | tuple)]
    return len(sections[0]) if sections else 3


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
