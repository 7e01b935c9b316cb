"""Which families are supported, and finding the one of a model."""

from __future__ import annotations

import importlib
import importlib.metadata
from typing import Any, TypeVar

from torch import nn

from winnow.core.errors import UnsupportedError, WinnowError
from winnow.models.family import Family
from winnow.models.generic import Generic
from winnow.models.supported_versions import check_version, is_trying

FAMILIES = {
    "aya_vision": "winnow.models.cohere_vision:CohereVision",
    "cohere2_vision": "winnow.models.cohere_vision:CohereVision",
    "idefics3": "winnow.models.idefics3:Idefics3",
    "internvl": "winnow.models.internvl:InternVL",
    "lighton_ocr": "winnow.models.mistral3:LightOnOcr",
    "llava": "winnow.models.llava:Llava",
    "llava_next": "winnow.models.llava_next:LlavaNext",
    "llava_next_video": "winnow.models.llava_next_video:LlavaNextVideo",
    "llava_onevision": "winnow.models.llava_onevision:LlavaOnevision",
    "minicpmv4_6": "winnow.models.minicpmv4_6:MiniCPMV46",
    "mistral3": "winnow.models.mistral3:Mistral3",
    "qianfan_ocr": "winnow.models.internvl:QianfanOCR",
    "qwen2_5_vl": "winnow.models.qwen2_5_vl:Qwen25VL",
    "smolvlm": "winnow.models.idefics3:Idefics3",
    "video_llava": "winnow.models.video_llava:VideoLlava",
}


def unwrap(model: Any) -> nn.Module:
    """The transformers model inside wrappers of PEFT and of torch.compile, or the model itself."""
    while True:
        if hasattr(model, "_orig_mod"):
            model = model._orig_mod
        elif hasattr(model, "get_base_model") and type(model).__module__.startswith("peft"):
            model = model.get_base_model()
        else:
            return model


def family_of(model: Any) -> Family:
    """The adapter of a model; unsupported models raise with what is supported and how to add one."""
    check_version(type(model).__name__)
    if not isinstance(model, nn.Module):
        raise WinnowError(f"compress takes a transformers model, got {type(model).__name__}.")
    if len(set((getattr(model, "hf_device_map", None) or {}).values())) > 1:
        raise UnsupportedError(
            f"{type(model).__name__} is spread over several devices (hf_device_map); "
            "this version compresses models on one."
        )
    kind = getattr(getattr(model, "config", None), "model_type", None)
    family = _class_of(kind)
    if family is None and is_trying():
        return Generic(model)
    if family is None or not hasattr(model, "lm_head"):
        raise UnsupportedError(
            f"{type(model).__name__} (model_type {kind!r}) is not supported; supported are the "
            f"ForConditionalGeneration classes of {', '.join(supported())}. "
            "A family is one short file: see the page 'Add a model family' of the documentation."
        )
    return family()


_registered: dict[str, type[Family]] = {}
F = TypeVar("F", bound=type[Family])


def register_family(cls: F) -> F:
    """Register an adapter from outside the package, for each of its `model_types`; also as a decorator.

    A distribution can offer it under the entry point group `winnow.families` instead.
    """
    for kind in cls.model_types:
        other = _registered.get(kind)
        if kind in FAMILIES or (other is not None and other.__qualname__ != cls.__qualname__):
            raise WinnowError(f"The model type {kind!r} has an adapter already; choose another.")
        _registered[kind] = cls
    return cls


def supported() -> tuple[str, ...]:
    """Model types with an adapter: built-in ones, installed plug-ins, and those registered by the user."""
    _load_plugins()
    return tuple(sorted({*FAMILIES, *_registered}))


def _load_plugins() -> None:
    for point in importlib.metadata.entry_points(group="winnow.families"):
        point.load()


def _class_of(kind: str | None) -> type[Family] | None:
    if kind in FAMILIES:
        module, _, name = FAMILIES[kind].partition(":")
        return getattr(importlib.import_module(module), name)
    if kind not in _registered:
        _load_plugins()
    return _registered.get(kind)  # type: ignore[arg-type]
