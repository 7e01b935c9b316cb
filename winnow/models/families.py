"""Which families are supported, and finding the one of a model."""

from __future__ import annotations

import importlib
from typing import Any

from torch import nn

from winnow.core.errors import UnsupportedError, WinnowError
from winnow.models.family import Family
from winnow.models.supported import check_version

FAMILIES = {
    "llava": "winnow.models.llava:Llava",
    "llava_next": "winnow.models.llava_next:LlavaNext",
    "qwen2_5_vl": "winnow.models.qwen2_5_vl:Qwen25VL",
}


def unwrap(model: Any) -> nn.Module:
    """The transformers model inside a PEFT wrapper, or the model itself."""
    while hasattr(model, "get_base_model") and type(model).__module__.startswith("peft"):
        model = model.get_base_model()
    return model


def family_of(model: Any) -> Family:
    """The adapter of a model; unsupported models raise with what is supported and how to add one."""
    check_version(type(model).__name__)
    if not isinstance(model, nn.Module):
        raise WinnowError(f"compress takes a transformers model, got {type(model).__name__}.")
    if hasattr(model, "_orig_mod"):
        raise UnsupportedError(
            "a model under torch.compile cannot be compressed: compress the model that was compiled."
        )
    if len(set((getattr(model, "hf_device_map", None) or {}).values())) > 1:
        raise UnsupportedError(
            f"{type(model).__name__} is spread over several devices (hf_device_map); "
            "this version compresses models on one."
        )
    kind = getattr(getattr(model, "config", None), "model_type", None)
    if kind not in FAMILIES or not hasattr(model, "lm_head"):
        raise UnsupportedError(
            f"{type(model).__name__} (model_type {kind!r}) is not supported; supported are the "
            f"ForConditionalGeneration classes of {', '.join(FAMILIES)}. "
            "A family is one short file in winnow/models: see CONTRIBUTING.md."
        )
    module, _, name = FAMILIES[kind].partition(":")
    return getattr(importlib.import_module(module), name)()
