"""The settings that tiny vision transformers share."""

from __future__ import annotations

from typing import Any


def tower(side: int, patch: int, *, layers: int = 3, **more: Any) -> dict[str, Any]:
    """The settings of a small vision transformer for square pictures of `side` pixels."""
    shape = {"hidden_size": 48, "intermediate_size": 96, "num_hidden_layers": layers, "num_attention_heads": 4}
    return shape | {"image_size": side, "patch_size": patch} | more
