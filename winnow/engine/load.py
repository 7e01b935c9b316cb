"""winnow.load: a model, under the plan that was asked for or that was saved with it."""

from pathlib import Path
from typing import Any

import torch

from winnow.core.errors import WinnowError
from winnow.core.method import Method
from winnow.core.plan import Plan
from winnow.engine.compress import compress
from winnow.engine.saving import read_plan
from winnow.models.load import load as load_in_full
from winnow.models.side_files import side_folder

AS_SAVED = "as saved"


def load(
    model: str | Path | None = None,
    *,
    plan: str | Plan | Method | None = AS_SAVED,
    device: str | torch.device | None = None,
    device_map: Any = None,
    dtype: str | torch.dtype | None = None,
    quantization: Any = None,
    revision: str | None = None,
    trust_remote_code: bool = False,
) -> tuple[Any, Any]:
    """A model in evaluation mode, and its processor. `winnow.handle_of(model)` is its handle, if it is compressed.

    A language model without pictures comes with its tokenizer; plans for it compress its cache.

    Args:
        model: an id of the Hugging Face Hub or a local folder, of a model or of a PEFT adapter; None is the bundled
            reference model.
        plan: what the model is compressed by. Default: by the plan that `save_pretrained` of a compressed model wrote
            beside the weights, and in full where there is none. None: in full, whatever stands there.
        device: default: the first GPU, or the CPU where there is none.
        device_map: instead of `device`: `"auto"`, `"balanced"`, `"sequential"`, or a mapping from the model's parts to
            devices, as transformers takes it. Needs accelerate.
        dtype: float32, bfloat16, float16 or float64; default: as the checkpoint says.
        quantization: `"8bit"` or `"4bit"` (with bitsandbytes), or a quantization configuration of transformers.
        revision: a branch, a tag or a commit of the Hub's repository.
        trust_remote_code: run Python code that comes with the checkpoint. Without it, such a checkpoint is refused.

    Raises:
        WinnowError: the checkpoint does not exist, is incomplete, is not in safetensors, or wants to run code; or an
            argument or the plan cannot be met.
        UnsupportedError: it is neither a vision-language model nor a language model, or not one that the plan runs on.
    """
    asked = isinstance(plan, str) and plan == AS_SAVED
    wanted = None if plan is None or asked else Plan.of(plan)  # a plan that cannot be read costs no loading
    built, processor = load_in_full(
        model,
        device=device,
        device_map=device_map,
        dtype=dtype,
        quantization=quantization,
        revision=revision,
        trust_remote_code=trust_remote_code,
    )
    folder = None if model is None or plan is None else side_folder(str(model), revision)
    saved = None if folder is None else read_plan(folder)
    if asked and saved is not None:
        wanted = _readable(saved, folder)
    if wanted is not None:
        handle = compress(built, wanted, processor=processor)
        if folder is not None and saved == wanted.key:
            handle.load(folder)
    return built, processor


def _readable(saved: str, folder: Path | None) -> Plan:
    try:
        return Plan.of(saved)
    except WinnowError as error:
        text = str(error)
    raise WinnowError(f"{text} This plan stands in {folder}; plan=None loads the model in full.")
