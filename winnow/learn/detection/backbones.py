"""Vision towers of transformers as backbones of the detector, their layers in the halves that ToC3D routes.

VitDet has what the backbone of the paper has: windows, and a few blocks that see a whole camera. SigLIP sees a whole
camera in every block. Both add positions where tokens begin, so that a token may go through a block without its
neighbours. A [CLS] would belong to no place of a grid; towers with one are not taken.
"""

from __future__ import annotations

from typing import Any

from jaxtyping import Float, Int
from torch import Tensor, nn
from transformers import SiglipVisionModel, VitDetModel

from winnow.core.errors import UnsupportedError
from winnow.learn.detection.blocks import PATCH, SIDE, Backbone
from winnow.learn.detection.detector import SELECTORS
from winnow.world.streets import PIXELS


def backbone_of(model: VitDetModel | SiglipVisionModel) -> Backbone:
    """A tower for `Detector(backbone=…)`, which shares its modules.

    Raises:
        UnsupportedError: a tower of another class, or one whose settings do not fit the pictures or cannot be routed.
    """
    kinds: dict[type, type[_Layer]] = {VitDetModel: _VitDetLayer, SiglipVisionModel: _SiglipLayer}
    if type(model) not in kinds:
        known = ", ".join(kind.__name__ for kind in kinds)
        raise UnsupportedError(f"{type(model).__name__} cannot be the detector's backbone; these can: {known}.")
    parts: Any = model
    layers = parts.encoder.layer if isinstance(model, VitDetModel) else parts.encoder.layers
    _refuse(model.config, len(layers))
    blocks = nn.ModuleList(kinds[type(model)](layer) for layer in layers)
    return Backbone(parts.config.hidden_size, _Patches(parts.embeddings), blocks)


def _refuse(config: Any, depth: int) -> None:
    wanted = {
        "patch_size": PATCH,
        "image_size": PIXELS,
        "num_channels": 3,
        "use_relative_position_embeddings": False,
        "residual_block_indices": [],
        "drop_path_rate": 0,
        "attention_dropout": 0,
        "dropout_prob": 0,
    }
    for name, value in wanted.items():
        given = getattr(config, name, value)
        if (list(given) if isinstance(given, tuple) else given) != value:
            raise UnsupportedError(f"{name} of the tower is {given}; the detector routes towers with {value}.")
    if depth <= SELECTORS[-1]:
        raise UnsupportedError(f"the tower has {depth} layers; the detector takes {SELECTORS[-1] + 1} or more.")
    window = getattr(config, "window_size", 0)
    if window and SIDE % window:
        raise UnsupportedError(f"window_size of the tower is {window}; the detector takes divisors of {SIDE}, and 0.")


class _Patches(nn.Module):
    """The first tokens of a tower, as `Patches` makes them."""

    def __init__(self, embeddings: nn.Module) -> None:
        super().__init__()
        self.embeddings = embeddings

    def forward(self, images: Float[Tensor, "b cameras h w 3"]) -> Float[Tensor, "b n c"]:
        made: Tensor = self.embeddings(pixels(images))
        rows = made.flatten(2).mT if made.ndim == 4 else made
        return rows.unflatten(0, images.shape[:2]).flatten(1, 2)


def pixels(images: Float[Tensor, "b cameras h w 3"]) -> Float[Tensor, "tiles 3 h w"]:
    """What the towers are given of images from 0 to 1: the cameras of all samples, from -1 to 1."""
    return (2 * images - 1).flatten(0, 1).movedim(-1, 1)


class _Layer(nn.Module):
    """A layer in two halves. Its rows know their places since they were made."""

    side = SIDE

    def __init__(self, layer: Any) -> None:
        super().__init__()
        self.layer = layer

    def attention(self, x: Float[Tensor, "b m c"], places: Int[Tensor, "b m"]) -> Float[Tensor, "b m c"]:
        raise NotImplementedError

    def update(self, x: Float[Tensor, "b m c"]) -> Float[Tensor, "b m c"]:
        raise NotImplementedError


class _VitDetLayer(_Layer):
    def __init__(self, layer: Any) -> None:
        super().__init__(layer)
        self.side = layer.window_size or SIDE

    def attention(self, x: Float[Tensor, "b m c"], places: Int[Tensor, "b m"]) -> Float[Tensor, "b m c"]:
        column = self.layer.norm1(x)[:, :, None]  # it takes grids, and one of a single column is a row of tokens
        return self.layer.attention(column)[0][:, :, 0]

    def update(self, x: Float[Tensor, "b m c"]) -> Float[Tensor, "b m c"]:
        return self.layer.mlp(self.layer.norm2(x))


class _SiglipLayer(_Layer):
    def attention(self, x: Float[Tensor, "b m c"], places: Int[Tensor, "b m"]) -> Float[Tensor, "b m c"]:
        return self.layer.self_attn(hidden_states=self.layer.layer_norm1(x), attention_mask=None)[0]

    def update(self, x: Float[Tensor, "b m c"]) -> Float[Tensor, "b m c"]:
        return self.layer.mlp(self.layer.layer_norm2(x))
