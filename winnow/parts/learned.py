"""Learned parts: trained weights are found, belong to the model that they were trained for, and run in fp32."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.func import functional_call

from winnow.core.errors import WinnowError
from winnow.core.info import ModelInfo

UNTRAINED = "untrained"
_REFERENCE = Path(__file__).resolve().parents[1] / "reference"
SHIPPED = _REFERENCE / "small" / "learned"
SHIPPED_TEXT = _REFERENCE / "recall" / "learned"
SHIPPED_VIDEO = _REFERENCE / "video" / "learned"


def learned(
    slug: str, weights: str | None, info: ModelInfo, make: Callable[..., nn.Module], part: str | None = None
) -> nn.Module:
    """A method's module with its trained weights.

    Args:
        weights: a file in safetensors that `winnow train` wrote, with its JSON beside it; `"untrained"` for random
            weights; None for those that winnow ships for one of its reference models (on plain tensors, random ones).
        make: builds the module from the sizes that the JSON names, which have defaults.
        part: the name of the module in what was trained, where that is more.

    Raises:
        WinnowError: there are none, or they were trained for another model.
    """
    if weights == UNTRAINED or (weights is None and info.fingerprint is None):
        return untrained(make)
    own = [folder / f"{slug}.safetensors" for folder in (SHIPPED, SHIPPED_TEXT, SHIPPED_VIDEO)]
    path = Path(weights) if weights is not None else next(filter(Path.exists, own), own[0])
    model = None if info.fingerprint is None else info.fingerprint()
    facts = None if weights is None and not path.exists() else facts_of(path, slug)
    if facts is None or model not in (None, facts["model"]):
        raise WinnowError(
            f"{slug}: the weights {'that winnow ships' if weights is None else f'in {weights}'} were trained for "
            f"another model than this {info.model}; train with `winnow train {slug} --model …` and pass weights=…"
        )
    try:
        with torch.random.fork_rng(devices=[]):
            module = make(**facts["sizes"])
        start = "" if part is None else f"{part}."
        given = {name: x.float() for name, x in load_file(path).items() if name.startswith(start)}
        module.load_state_dict({name.removeprefix(start): x for name, x in given.items()})
        return module
    except (OSError, SafetensorError, RuntimeError, TypeError) as error:
        reason = str(error).split("\n")[0]
    raise WinnowError(f"{slug}: the weights in {path} do not fit this method and its settings ({reason}); train anew.")


def facts_of(path: Path, slug: str) -> dict[str, Any]:
    """What the JSON beside a file of weights says of them."""
    try:
        facts: dict[str, Any] = json.loads(path.with_suffix(".json").read_text(encoding="utf-8"))
        if facts["method"] == slug and isinstance(facts["sizes"], dict) and isinstance(facts["model"], str):
            return facts
    except (OSError, ValueError, KeyError, TypeError):
        pass
    raise WinnowError(
        f"{slug}: {path} has no readable JSON of this method beside it; give a .safetensors file that "
        f"`winnow train {slug}` wrote."
    )


def untrained(make: Callable[[], nn.Module], seed: int = 0) -> nn.Module:
    """A module with random matrices from a seed (Glorot's uniform), biases and gates of 0, and other vectors of 1.

    The global random generator is left alone.
    """
    with torch.random.fork_rng(devices=[]):
        module = make()
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in sorted(module.named_parameters()):
        if parameter.ndim > 1:
            nn.init.xavier_uniform_(parameter, generator=generator)
        else:
            nn.init.constant_(parameter, 0.0 if name.endswith(("bias", "gate")) else 1.0)
    return module


def in_fp32(module: nn.Module, *inputs: Any) -> Any:
    """A module's output, computed at least in fp32 whatever the dtype of its weights. Floats are converted."""
    own = dict(module.named_parameters())
    narrow = {name: x.float() for name, x in own.items() if x.dtype in (torch.bfloat16, torch.float16)}
    dtype = torch.float32 if narrow else next(iter(own.values())).dtype
    inputs = tuple(x.to(dtype) if isinstance(x, Tensor) and x.is_floating_point() else x for x in inputs)
    return functional_call(module, narrow, inputs) if narrow else module(*inputs)
