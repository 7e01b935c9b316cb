"""Load a model and its processor: the bundled reference model, or a checkpoint in safetensors.

A language model without pictures comes with its tokenizer.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterator, Mapping
from importlib.util import find_spec
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
import transformers
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoProcessor,
    AutoTokenizer,
    PretrainedConfig,
)
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES,
)

from winnow.core.errors import UnsupportedError, WinnowError
from winnow.models.attempt import HOW, attempt
from winnow.models.families import supported
from winnow.models.quantized import check_runs, quantized
from winnow.models.side_files import PICKLES, adapter_of

MAPS = ("auto", "balanced", "balanced_low_0", "sequential")
DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
_DTYPE_NAMES = ", ".join(str(dtype).removeprefix("torch.") for dtype in DTYPES)


def load(
    model: str | Path | None = None,
    *,
    device: str | torch.device | None = None,
    device_map: str | Mapping[str, Any] | None = None,
    dtype: str | torch.dtype | None = None,
    quantization: Any = None,
    revision: str | None = None,
    trust_remote_code: bool = False,
) -> tuple[Any, Any]:
    """A model in evaluation mode, and its processor; in full, also where a plan stands beside the weights.

    A language model without pictures (`AutoModelForCausalLM`) comes with its tokenizer.

    Args:
        model: an id of the Hugging Face Hub or a local folder, of a model or of a PEFT adapter; None is the bundled
            reference model.
        device: default: the first GPU, or the CPU where there is none.
        device_map: instead of `device`: `"auto"`, `"balanced"`, `"sequential"`, or a mapping from the model's parts to
            devices, as transformers takes it. Needs accelerate.
        dtype: float32, bfloat16, float16 or float64; default: as the checkpoint says.
        quantization: `"8bit"` or `"4bit"` (with bitsandbytes), or a quantization configuration of transformers.
        revision: a branch, a tag or a commit of the Hub's repository.
        trust_remote_code: run Python code that comes with the checkpoint. Without it, such a checkpoint is refused.

    Raises:
        WinnowError: the checkpoint does not exist, is incomplete, is not in safetensors, or wants to run code; or an
            argument cannot be met.
        UnsupportedError: it is neither a vision-language model nor a language model.
    """
    if device is not None and device_map is not None:
        raise WinnowError("give device= or device_map=, not both: a map says where each part goes.")
    places, precision = _device_map(device_map), _dtype(dtype)
    where = device_of(device) if places is None else None
    if model is None and revision is None and places is None and quantization is None:
        from winnow import reference

        built, processor = reference.load("small")
        return _placed(built, where, precision), processor
    if model is None:
        from winnow import reference

        model = reference.path("small")
    name = str(model)
    _refuse_revision(name, revision)
    options: dict[str, Any] = {"revision": revision, "trust_remote_code": trust_remote_code}
    adapter = adapter_of(name, revision)
    base, shared = (name, options) if adapter is None else (adapter.base, {**options, "revision": adapter.revision})
    settings = _settings(base, shared["revision"])
    if not trust_remote_code:
        _refuse_code(base, settings)
    kind = settings.get("model_type")
    text = kind not in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES and kind in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
    if not text and kind not in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES and not trust_remote_code:
        raise UnsupportedError(
            f"{base} is a checkpoint of type {kind!r}, which is neither a vision-language model nor a language model "
            f"that transformers {transformers.__version__} knows; winnow works on {', '.join(supported())}, and on the "
            "cache of language models."
        )
    _refuse_dtype(base, settings, precision)
    _refuse_pickle(base)
    low = quantized(base, settings, quantization, precision)
    if low is not None and places is None:
        places = {"": where}  # quantised weights are made on their device and do not move
    disk = None if places is None else TemporaryDirectory(prefix="winnow-offload-")
    built, report = attempt(
        f"The weights of {base} could not be loaded",
        lambda: (AutoModelForCausalLM if text else AutoModelForImageTextToText).from_pretrained(
            base,
            dtype=precision,
            use_safetensors=True,
            output_loading_info=True,
            **({} if disk is None else {"device_map": places, "offload_folder": disk.name}),
            **({} if low is None else {"quantization_config": low}),
            **shared,
        ),
        "" if places is None else _PLACES,
    )
    if disk is not None:
        weakref.finalize(built, disk.cleanup)  # what is offloaded to disk lies there while the model lives
    # transformers only warns, and goes on with random numbers in the place of what is missing.
    lost = sorted({*report["missing_keys"], *(key[0] for key in report["mismatched_keys"])})
    if lost:
        shown = ", ".join(lost[:3]) + (f" and {len(lost) - 3} more" if len(lost) > 3 else "")
        raise WinnowError(f"The checkpoint {base} lacks weights of the right shape for {shown}; use a complete one.")
    if isinstance(places, dict):
        _refuse_gaps(built, places)
    if low is not None:
        check_runs(built, base)
    if adapter is not None:
        built = adapter.attach(built)
    source = name if adapter is None or adapter.has_processor else base
    processor = _tokenizer(source, options) if text else _processor(source, options)
    return _placed(built, where if places is None else None), processor


def _tokenizer(name: str, options: dict[str, Any]) -> Any:
    return attempt(
        f"The tokenizer of {name} could not be loaded", lambda: AutoTokenizer.from_pretrained(name, **options), HOW
    )


def _processor(name: str, options: dict[str, Any]) -> Any:
    processor = attempt(
        f"The processor of {name} could not be loaded",
        lambda: AutoProcessor.from_pretrained(name, **options),
        HOW if find_spec("torchvision") else _NEEDS,
    )
    if getattr(processor, "image_processor", None) is None:
        raise WinnowError(f"{name} has no image processor (preprocessor_config.json); use a complete checkpoint.")
    return processor


def _placed(built: nn.Module, where: torch.device | None, precision: str | torch.dtype = "auto") -> nn.Module:
    """In evaluation mode and on a device; None: where its parts are."""
    if where is not None:
        built = built.to(where, None if isinstance(precision, str) else precision)
    return built.eval()


_PLACES = (
    "check device_map (it takes auto, balanced, sequential, or a mapping from each part of the model to a device), and "
    f"that the parts fit there; or {HOW}"
)


_NEEDS = (
    "use a complete checkpoint; and this one may need torchvision, which is not installed (Qwen2.5-VL's processor "
    "does): pip install torchvision"
)


def _settings(name: str, revision: str | None) -> dict[str, Any]:
    """The checkpoint's config.json."""
    if Path(name).is_dir() and not (Path(name) / "config.json").is_file():
        raise WinnowError(f"The folder {name} has no config.json, so it is not a checkpoint: {HOW}")
    settings, _ = attempt(
        f"There is no checkpoint {name}" + ("" if revision is None else f" at revision {revision!r}"),
        lambda: PretrainedConfig.get_config_dict(name, revision=revision),
    )
    if not settings:
        raise WinnowError(f"There is no checkpoint {name}: {HOW}")
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


def _refuse_revision(name: str, revision: str | None) -> None:
    if revision is None:
        return
    if not isinstance(revision, str) or not revision:
        raise WinnowError(f"revision={revision!r}; give a branch, a tag or a commit of the Hub's repository.")
    if Path(name).is_dir():
        raise WinnowError(f"revision={revision!r}: the folder {name} has no revisions; give a Hub id, or leave it out.")


def _device_map(given: str | Mapping[str, Any] | None) -> str | dict[str, Any] | None:
    if given is None:
        return None
    if not isinstance(given, Mapping) and not (isinstance(given, str) and given in MAPS):
        raise WinnowError(
            f"device_map={given!r}; allowed: {', '.join(MAPS)}, or a mapping from the model's parts to devices. "
            "For one device, give device=."
        )
    if find_spec("accelerate") is None:
        raise WinnowError("device_map= needs accelerate, which is not installed: pip install accelerate")
    return given if isinstance(given, str) else dict(given)


def _refuse_gaps(built: nn.Module, places: Mapping[str, Any]) -> None:
    """transformers leaves a part that the map forgets on the CPU, where the others do not find it."""
    if "" in places:
        return
    left = [n for n, _ in built.named_parameters() if not any(f"{n}.".startswith(f"{own}.") for own in places)]
    if left:
        parts = sorted({name.rpartition(".")[0] for name in left}, key=len)
        raise WinnowError(f"device_map gives no place to {len(left)} weights, of {parts[0]} among others; give one.")


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
