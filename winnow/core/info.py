"""ModelInfo: what is known about a model before it sees data."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

from winnow.core.errors import WinnowError


@dataclass(frozen=True)
class ModelInfo:
    """What a method may know when it lists its steps.

    Attributes:
        model: class name, for messages.
        family: adapter name (`llava`, `llava_next`, `qwen2_5_vl`, …).
        depth: LM layers.
        width: LM hidden size.
        vision_depth: blocks of the vision tower.
        sound_depth: layers of the encoder of sounds that signals can see; 0: none.
        feature_layer: block whose output feeds the projector (negative counts from the end).
        has_cls: whether the tower has a [CLS] token.
        points: points at which this family can act.
        mrope: whether positions are 3-D (temporal, height, width).
        merge: patches of one side that make one token (2: a token is 2 × 2 patches).
        modalities: of the items that the model reads; empty where there is no model.
        vision_width: width of the tower's output at `features`.
        heads: query heads of an LM layer.
        kv_heads: heads of the keys and values of an LM layer.
        head_dim: width of a key of one head.
        token_side: pixels of one side of a token, in a model that takes pictures at their own resolution; None in
            others, whose pictures are brought to one size, or to tiles of one size.
        fingerprint: gives a word that tells the model's weights from others of its shape; None where there is no model.
    """

    model: str = "model"
    family: str = "none"
    depth: int = 1
    width: int = 1
    vision_depth: int = 1
    feature_layer: int = -1
    has_cls: bool = True
    points: tuple[str, ...] = ("features", "projected", "layers")
    mrope: bool = False
    merge: int = 1
    vision_width: int = 1
    modalities: tuple[str, ...] = ()
    heads: int = 1
    kv_heads: int = 1
    head_dim: int = 1
    sound_depth: int = 0
    token_side: int | None = None
    fingerprint: Callable[[], str] | None = field(default=None, compare=False, repr=False)

    def lm_layer(self, layer: int, what: str = "layer") -> int:
        """Check an LM layer number: `layers[k]` acts before layer k, so k is 0 … depth − 1."""
        if not isinstance(layer, int) or isinstance(layer, bool) or not 0 <= layer < self.depth:
            raise WinnowError(
                f"{what}={layer!r}: {self.model} has {self.depth} LM layers; "
                f"a step acts before layer 0 … {self.depth - 1}."
            )
        return layer

    def at_depth(self, share: float) -> int:
        """The layer at a share of the depth: `at_depth(7/8)` of 32 layers is 28; at most the last layer."""
        return min(self.depth - 1, max(0, int(self.depth * share)))
