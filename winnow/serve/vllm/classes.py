"""Subclasses of vLLM's model classes, made when vLLM asks for them: `winnow.serve.vllm.classes:<architecture>…`."""

from __future__ import annotations

import importlib
import re
from typing import Any

ARCHITECTURES = (
    "Gemma3ForConditionalGeneration",
    "Idefics3ForConditionalGeneration",
    "InternVLForConditionalGeneration",
    "LlavaForConditionalGeneration",
    "LlavaNextForConditionalGeneration",
    "LlavaOnevisionForConditionalGeneration",
    "Qwen2VLForConditionalGeneration",
    "Qwen2_5_VLForConditionalGeneration",
    "Qwen3VLForConditionalGeneration",
    "SmolVLMForConditionalGeneration",
)
"""The architectures that have tests."""
_made: dict[str, Any] = {}


def _suffix() -> str:
    """What is put behind an architecture: vLLM remembers what it found of a class by its name."""
    import vllm

    return "_winnow_" + re.sub(r"\W", "_", vllm.__version__)


def register_all() -> None:
    """Register a subclass for every multimodal class that vLLM has: those without an adapter refuse to start."""
    from vllm.model_executor.models import registry

    for architecture in registry._MULTIMODAL_MODELS:
        present = registry.ModelRegistry.models.get(architecture)
        if getattr(present, "module_name", "") != __name__:
            registry.ModelRegistry.register_model(architecture, f"{__name__}:{architecture}{_suffix()}")


def __getattr__(name: str) -> Any:
    if "_winnow_" not in name or not name.endswith(_suffix()):
        raise AttributeError(name)
    if name not in _made:
        _made[name] = _subclass(name, name.removesuffix(_suffix()))
    return _made[name]


def _subclass(name: str, architecture: str) -> Any:
    from vllm.model_executor.models import registry

    from winnow.serve.vllm.encoder import CompressedEncoder
    from winnow.serve.vllm.positions import KeptPositions
    from winnow.serve.vllm.processor import compressing
    from winnow.serve.vllm.refusals import NotSupported

    module, plain = registry._MULTIMODAL_MODELS[architecture]
    base = getattr(importlib.import_module(f"vllm.model_executor.models.{module}"), plain)
    own = {"__module__": __name__, "__qualname__": name}
    if architecture not in ARCHITECTURES:
        return type(name, (NotSupported, base), own)
    mixins = (KeptPositions, CompressedEncoder) if getattr(base, "supports_mrope", False) else (CompressedEncoder,)
    own["_processor_factory"] = compressing(base._processor_factory)
    return type(name, (*mixins, base), own)
