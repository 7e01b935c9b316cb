"""Which families are supported, and finding the one of a model."""

from __future__ import annotations

import importlib
import importlib.metadata
from typing import Any, TypeVar

from torch import nn

from winnow.core.errors import UnsupportedError, WinnowError
from winnow.models.acceptance import accepted_points
from winnow.models.family import Family
from winnow.models.generic import Generic
from winnow.models.supported_versions import check_version, is_trying
from winnow.models.text import Text

FAMILIES = {
    "aya_vision": "winnow.models.cohere_vision:CohereVision",
    "cohere2_vision": "winnow.models.cohere_vision:CohereVision",
    "gemma3": "winnow.models.gemma3:Gemma3",
    "gemma4": "winnow.models.gemma4:Gemma4",
    "gemma4_unified": "winnow.models.gemma4:Gemma4Unified",
    "glm46v": "winnow.models.glm4v:Glm4V",
    "glm4v": "winnow.models.glm4v:Glm4V",
    "glm4v_moe": "winnow.models.glm4v:Glm4V",
    "glm_ocr": "winnow.models.glm4v:Glm4V",
    "idefics3": "winnow.models.idefics3:Idefics3",
    "internvl": "winnow.models.internvl:InternVL",
    "lighton_ocr": "winnow.models.mistral3:LightOnOcr",
    "llama4": "winnow.models.llama4:Llama4",
    "llava": "winnow.models.llava:Llava",
    "llava_next": "winnow.models.llava_next:LlavaNext",
    "llava_next_video": "winnow.models.llava_next_video:LlavaNextVideo",
    "llava_onevision": "winnow.models.llava_onevision:LlavaOnevision",
    "minicpmv4_6": "winnow.models.minicpmv4_6:MiniCPMV46",
    "mistral3": "winnow.models.mistral3:Mistral3",
    "mllama": "winnow.models.mllama:Mllama",
    "paligemma": "winnow.models.paligemma:PaliGemma",
    "qianfan_ocr": "winnow.models.internvl:QianfanOCR",
    "qwen2_5_omni_thinker": "winnow.models.qwen2_5_omni:Qwen25Omni",
    "qwen2_5_vl": "winnow.models.qwen2_5_vl:Qwen25VL",
    "qwen2_audio": "winnow.models.qwen2_audio:Qwen2Audio",
    "qwen2_vl": "winnow.models.qwen2_vl:Qwen2VL",
    "qwen3_5": "winnow.models.qwen3_5:Qwen35",
    "qwen3_5_moe": "winnow.models.qwen3_5:Qwen35",
    "qwen3_vl": "winnow.models.qwen3_vl:Qwen3VL",
    "qwen3_vl_moe": "winnow.models.qwen3_vl:Qwen3VL",
    "shieldgemma2": "winnow.models.gemma3:Gemma3",
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
    family = _class_of(_kind(model))
    if family is not None and _has_head(model):
        return family()
    text = family is None and Text.fits(model)
    if text and not Text.why_not(model):
        return Text()
    if family is None and Generic.fits(model):
        return Generic(model, _checked_points(model))
    reason = (
        Text.why_not(model)
        if text
        else Generic.why_not(model)
        if family is None
        else "it has no head that says words; load the ForConditionalGeneration class"
    )
    raise UnsupportedError(
        f"{type(model).__name__} (model_type {_kind(model)!r}) is not supported: {reason}. `winnow "
        "families` lists what works for each class. An adapter is one short file: see the page 'Add a model family' of "
        "the documentation."
    )


def is_unchecked(model: Any) -> bool:
    """Whether a model has no adapter of its own, and the generic one must be checked on it first."""
    if not isinstance(model, nn.Module) or _class_of(_kind(model)) is not None or not Generic.fits(model):
        return False
    return not accepted_points(model)


def _checked_points(model: Any) -> tuple[str, ...]:
    """Where a model without an adapter of its own can be compressed: everywhere while it is being checked."""
    if is_trying():
        return Generic.points
    points = accepted_points(model)
    if not points:
        raise UnsupportedError(
            f"{type(model).__name__} has no adapter of its own. The generic one runs once the checks of winnow doctor "
            "have passed on this very model: pass processor= to winnow.compress, or call "
            "winnow.engine.doctor.diagnose(model, processor) first. It takes seconds, and is remembered."
        )
    return points


def _kind(model: Any) -> str | None:
    return getattr(getattr(model, "config", None), "model_type", None)


def _has_head(model: Any) -> bool:
    """Whether a model says words: a base model of a known family does not."""
    outputs = getattr(model, "get_output_embeddings", None)
    return hasattr(model, "lm_head") or (outputs is not None and outputs() is not None)


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


def streaming() -> tuple[str, ...]:
    """Model types whose frames can be read one by one."""
    return tuple(kind for kind in supported() if getattr(_class_of(kind), "streams", False))


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
