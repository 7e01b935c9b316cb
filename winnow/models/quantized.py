"""Weights of 8 or 4 bits: which configuration transformers is given, and whether the model then runs here."""

from importlib.util import find_spec
from typing import Any

import torch
from torch import nn
from transformers import BitsAndBytesConfig
from transformers.utils.quantization_config import QuantizationConfigMixin

from winnow.core.errors import WinnowError
from winnow.models.attempt import attempt

BITS = ("8bit", "4bit")


def quantized(name: str, settings: dict[str, Any], wanted: Any, precision: str | torch.dtype) -> Any:
    """The configuration for what the caller wants; None: the weights as they are.

    Args:
        settings: the checkpoint's config.json.
        wanted: one of BITS, or a configuration of transformers.
        precision: in which the rest of the model computes.
    """
    if wanted is None:
        return None
    if not isinstance(wanted, QuantizationConfigMixin) and not (isinstance(wanted, str) and wanted in BITS):
        raise WinnowError(
            f"quantization={wanted!r}; allowed: {', '.join(BITS)}, or a quantization configuration of transformers, "
            "such as TorchAoConfig."
        )
    if settings.get("quantization_config"):
        raise WinnowError(f"The checkpoint {name} is quantised already; leave quantization= (--quantization) out.")
    if find_spec("accelerate") is None:
        raise WinnowError("quantization= needs accelerate, which is not installed: pip install accelerate")
    if isinstance(wanted, QuantizationConfigMixin):
        return wanted
    if find_spec("bitsandbytes") is None:
        raise WinnowError(
            f"quantization={wanted!r} needs bitsandbytes, which is not installed: "
            "pip install 'tokenwinnow[quantization]'"
        )
    if wanted == "8bit":
        return BitsAndBytesConfig(load_in_8bit=True)
    return BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=_computed_in(settings, precision)
    )


def _computed_in(settings: dict[str, Any], precision: str | torch.dtype) -> torch.dtype:
    """The dtype of the model's own arithmetic: as asked for, or as the checkpoint says."""
    if isinstance(precision, torch.dtype):
        return precision
    said = getattr(torch, str(settings.get("dtype") or settings.get("torch_dtype")), None)
    return said if isinstance(said, torch.dtype) else torch.float32


@torch.no_grad()
def check_runs(model: Any, name: str) -> None:
    """Refuse weights that cannot be multiplied on this machine: each shape is tried once.

    Kernels for quantised weights take some shapes and some devices only, and say so when they are first called.
    """
    tried = set()
    for part in model.modules():
        shape = (type(part), getattr(part, "in_features", 0), getattr(part, "out_features", 0))
        if isinstance(part, nn.Linear) and not part.weight.is_meta and shape not in tried:
            tried.add(shape)
            row = torch.zeros(1, part.in_features, dtype=model.dtype, device=part.weight.device)
            attempt(
                f"The quantised weights of {name} ({shape[2]} × {shape[1]}) do not run on {row.device}",
                lambda part=part, row=row: part(row),  # type: ignore[misc]
                "use another quantization, another device, or the weights as they are.",
            )
