"""Load a vision-language model and its processor: the bundled reference model, or a checkpoint in safetensors."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import nn
from transformers import AutoModelForImageTextToText, AutoProcessor, PretrainedConfig
from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES

from winnow.core.errors import UnsupportedError, WinnowError
from winnow.models.families import supported

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
_DTYPE_NAMES = ", ".join(str(dtype).removeprefix("torch.") for dtype in DTYPES)
PICKLES = ("*.bin", "*.pt", "*.pth", "*.pkl", "*.ckpt")


def quiet() -> None:
    """Nothing of transformers or the Hub's client on the terminal but their errors."""
    logging.getLogger("huggingface_hub").setLevel(logging.ERROR)
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()


def load(
    model: str | Path | None = None,
    *,
    device: str | torch.device | None = None,
    dtype: str | torch.dtype | None = None,
    trust_remote_code: bool = False,
) -> tuple[Any, Any]:
    """A model in evaluation mode, and its processor.

    Args:
        model: an id of the Hugging Face Hub or a local folder; None is the bundled reference model.
        device: default: the first GPU, or the CPU where there is none.
        dtype: float32, bfloat16, float16 or float64; default: as the checkpoint says.
        trust_remote_code: run Python code that comes with the checkpoint. Without it, such a checkpoint is refused.

    Raises:
        WinnowError: the checkpoint does not exist, is incomplete, is not in safetensors, or wants to run code.
        UnsupportedError: it is not a vision-language model.
    """
    where, precision = device_of(device), _dtype(dtype)
    if model is None:
        from winnow import reference

        built, processor = reference.load("small")
        return _placed(built, where, precision), processor
    name = str(model)
    settings = _settings(name)
    if not trust_remote_code:
        _refuse_code(name, settings)
    if settings.get("model_type") not in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES and not trust_remote_code:
        raise UnsupportedError(
            f"{name} is a checkpoint of type {settings.get('model_type')!r}, which is not a vision-language model that "
            f"transformers {transformers.__version__} knows; winnow works on {', '.join(supported())}."
        )
    _refuse_dtype(name, settings, precision)
    _refuse_pickle(name)
    built, report = _attempt(
        f"The weights of {name} could not be loaded",
        lambda: AutoModelForImageTextToText.from_pretrained(
            name, dtype=precision, use_safetensors=True, trust_remote_code=trust_remote_code, output_loading_info=True
        ),
    )
    # transformers only warns, and goes on with random numbers in the place of what is missing.
    lost = sorted({*report["missing_keys"], *(key[0] for key in report["mismatched_keys"])})
    if lost:
        shown = ", ".join(lost[:3]) + (f" and {len(lost) - 3} more" if len(lost) > 3 else "")
        raise WinnowError(f"The checkpoint {name} lacks weights of the right shape for {shown}; use a complete one.")
    processor = _attempt(
        f"The processor of {name} could not be loaded",
        lambda: AutoProcessor.from_pretrained(name, trust_remote_code=trust_remote_code),
        _HOW if find_spec("torchvision") else _NEEDS,
    )
    if getattr(processor, "image_processor", None) is None:
        raise WinnowError(f"{name} has no image processor (preprocessor_config.json); use a complete checkpoint.")
    return _placed(built, where), processor


def _placed(built: nn.Module, where: torch.device, precision: str | torch.dtype = "auto") -> nn.Module:
    return built.to(where, None if isinstance(precision, str) else precision).eval()


def _attempt(what: str, step: Any, how: str = "") -> Any:
    """Run a step of transformers; if it fails, raise one line of winnow's own without the library's text."""
    try:
        return step()
    except Exception as error:
        reason = type(error).__name__
    raise WinnowError(f"{what} ({reason}): {how or _HOW}")


_HOW = (
    "give a Hub id such as llava-hf/llava-1.5-7b-hf that is in the local cache or can be downloaded (HF_HUB_OFFLINE is "
    "not set), or a folder with config.json, *.safetensors and the processor's files."
)


_NEEDS = (
    "use a complete checkpoint; and this one may need torchvision, which is not installed (Qwen2.5-VL's processor "
    "does): pip install torchvision"
)


def _settings(name: str) -> dict[str, Any]:
    """The checkpoint's config.json."""
    if Path(name).is_dir() and not (Path(name) / "config.json").is_file():
        raise WinnowError(f"The folder {name} has no config.json, so it is not a checkpoint: {_HOW}")
    settings, _ = _attempt(f"There is no checkpoint {name}", lambda: PretrainedConfig.get_config_dict(name))
    if not settings:
        raise WinnowError(f"There is no checkpoint {name}: {_HOW}")
    return settings


def _refuse_code(name: str, settings: dict[str, Any]) -> None:
    for path, key, value in _entries(settings):
        if key == "auto_map" or key.endswith("_implementation_internal"):
            wants = "brings Python code of its own"
        elif key.endswith("_implementation") and "/" in str(value):
            wants = "asks for kernels from the Hub"
        else:
            continue
        raise WinnowError(
            f"The checkpoint {name} {wants} ({path} in config.json); winnow does not run it. If you trust its authors, "
            "say trust_remote_code=True (--trust-remote-code)."
        )


def _entries(value: Any, path: str = "") -> Iterator[tuple[str, str, Any]]:
    if isinstance(value, dict):
        for key, inner in value.items():
            at = f"{path}.{key}" if path else str(key)
            yield at, str(key), inner
            yield from _entries(inner, at)


def _refuse_pickle(name: str) -> None:
    folder = Path(name)
    if folder.is_dir() and not any(folder.glob("*.safetensors")) and any(any(folder.glob(p)) for p in PICKLES):
        raise WinnowError(
            f"The weights in {name} are pickled, and unpickling runs whatever code they hold; winnow loads safetensors "
            "only. Convert them with model.save_pretrained(folder) where you trust them."
        )


def device_of(device: str | torch.device | None) -> torch.device:
    """The device that a user named; the first GPU, or the CPU, for None."""
    if device is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        found = torch.device(device)
        usable = torch.ones(1, device=found).item() == 1  # "meta" and devices that torch was not built for fail here
    except Exception:
        usable = False
    if not usable:
        raise WinnowError(f"device={device!r} is not on this machine; give cpu, or cuda where there is a GPU.")
    return found


def _dtype(dtype: str | torch.dtype | None) -> str | torch.dtype:
    """A dtype in which a whole model can run, or "auto"."""
    if dtype is None or (isinstance(dtype, str) and dtype == "auto"):
        return "auto"
    found = getattr(torch, dtype, None) if isinstance(dtype, str) else dtype
    if not (isinstance(found, torch.dtype) and found in DTYPES):
        raise WinnowError(f"dtype={dtype!r}; allowed: auto, {_DTYPE_NAMES}.")
    return found


def _refuse_dtype(name: str, settings: dict[str, Any], precision: str | torch.dtype) -> None:
    """`auto` takes the dtype of config.json, which can be one that no model runs in."""
    said = settings.get("dtype") or settings.get("torch_dtype")
    if precision == "auto" and said is not None and getattr(torch, str(said), None) not in DTYPES:
        raise WinnowError(
            f"The checkpoint {name} says dtype {said!r} in config.json, in which no model runs; "
            f"say in which to load it (dtype=, --dtype): {_DTYPE_NAMES}."
        )
