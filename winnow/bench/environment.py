"""The settings of a run that could change its results, and the machine it ran on."""

from __future__ import annotations

import functools
import hashlib
import json
import os
import platform
import shlex
import sys
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
import transformers

from winnow._version import __version__
from winnow.bench import schema
from winnow.core.plan import SCHEMA
from winnow.models.inputs import prompt

CODE = ("core", "engine", "methods", "models", "parts", "signals", "bench")
APART = (
    "report",
    "charts",
    "intervals",
    "clock",
    "speed",
    "rounds",
    "native",
    "prefills",
    "summary",
    "processes",
)  # parts of the bench that change no answer


def model_settings(model: Any, processor: Any, name: str) -> dict[str, Any]:
    """The model to the last bit, and how it is run."""
    first = next(model.parameters())
    return {
        "model": name,
        "revision": getattr(model.config, "_commit_hash", None) or "",
        "weights": weights_hash(model),
        "configuration": _digest(model.config.to_json_string(use_diff=False)),
        "processor": _digest(repr(getattr(processor, "image_processor", ""))),
        "prompt": prompt(processor, "{question}"),
        "device": first.device.type if first.device.type == "cpu" else torch.cuda.get_device_name(first.device),
        "dtype": str(first.dtype).removeprefix("torch."),
        "attention": model.config.get_text_config()._attn_implementation,
    }


def code_settings() -> dict[str, Any]:
    """Versions, and a hash of winnow's own code: an edited method is another method."""
    return {
        "winnow": __version__,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "pillow": metadata.version("pillow"),
        "store": schema.VERSION,
        "plans": SCHEMA,
        "code": code_hash(),
        "threads": torch.get_num_threads(),
    }


@functools.cache
def code_hash() -> str:
    """Of the source files that could change an answer, as this process found them."""
    root = Path(__file__).resolve().parent.parent
    digest = hashlib.sha256()
    for folder in CODE:
        for path in sorted((root / folder).rglob("*.py")):
            if not (folder == "bench" and path.stem.startswith(APART)):
                digest.update(str(path.relative_to(root)).encode() + path.read_bytes())
    return digest.hexdigest()[:16]


def weights_hash(model: torch.nn.Module) -> str:
    """Of all parameters and buffers, by name."""
    digest = hashlib.blake2b(digest_size=16)
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
    return digest.hexdigest()


def run_key(settings: dict[str, Any]) -> str:
    """Equal settings are the same run."""
    return _digest(json.dumps(settings, sort_keys=True))


def environment() -> dict[str, Any]:
    """The machine, as far as it explains a time."""
    found: dict[str, Any] = {
        "machine": platform.machine(),
        "system": f"{platform.system()} {platform.release()}",
        "python": platform.python_version(),
        "processor": _processor(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "load": [round(x, 2) for x in os.getloadavg()] if hasattr(os, "getloadavg") else None,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "winnow": __version__,
    }
    if Path(sys.argv[0]).name == "winnow":
        found["command"] = shlex.join(["winnow", *sys.argv[1:]])
    if torch.cuda.is_available():
        about = torch.cuda.get_device_properties(0)
        found["gpu"] = {
            "name": about.name,
            "memory_gib": round(about.total_memory / 2**30, 1),
            "cuda": torch.version.cuda,
            "cudnn": torch.backends.cudnn.version(),
        }
    return found


def _processor() -> str:
    if sys.platform == "linux":
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor()


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:16]
