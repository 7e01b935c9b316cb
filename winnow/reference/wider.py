"""The reference model with wider heads, for attention kernels that take none of its width; it computes the same.

Queries, keys and values are padded with zeros. Products of queries and keys are divided by the root of the wider width,
so queries are multiplied by the ratio of the roots. Rotation turns the first, true channels of each head alone, at the
frequencies that they had: their share is `partial_rotary_factor`, which vLLM reads for Llama and transformers does not.
Names are those of published LLaVA checkpoints, and numbers are in float32.
"""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path

import torch
from jaxtyping import Float
from safetensors.torch import load_file, save_file
from torch import Tensor

from winnow.core.errors import WinnowError
from winnow.reference import path

BESIDE = (
    *("chat_template.jinja", "generation_config.json", "processor_config.json"),
    *("tokenizer.json", "tokenizer_config.json"),
)


def write_wider(folder: Path, width: int = 64, preset: str = "small") -> Path:
    """Write the shipped model with heads of `width` channels into a folder.

    Args:
        folder: is made, and must not exist.

    Raises:
        WinnowError: its heads are not narrower than that.
    """
    source = path(preset)
    config = json.loads((source / "config.json").read_text(encoding="utf-8"))
    text = config["text_config"]
    narrow = text["head_dim"]
    if width <= narrow:
        raise WinnowError(f"width={width}: the heads of {preset!r} have {narrow} channels; give more.")
    text["head_dim"] = width
    text["rope_parameters"] |= {"partial_rotary_factor": narrow / width}
    config["dtype"] = "float32"
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
    for name in BESIDE:
        shutil.copyfile(source / name, folder / name)
    tensors = {
        name.replace("vision_tower.", "vision_tower.vision_model."): widened(name, x.float(), narrow, width)
        for name, x in load_file(source / "model.safetensors").items()
    }
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def widened(name: str, weight: Tensor, narrow: int, width: int) -> Tensor:
    """A weight of the model, for heads of `width` channels, of which all behind the first `narrow` are zero."""
    projection = name.rpartition("self_attn.")[2] if name.startswith("language_model.") else ""
    if projection == "o_proj.weight":
        return _padded(weight.T, narrow, width).T.contiguous()
    if projection in ("q_proj.weight", "k_proj.weight", "v_proj.weight"):
        weight = weight * math.sqrt(width / narrow) if projection == "q_proj.weight" else weight
        return _padded(weight, narrow, width)
    return weight


def _padded(weight: Float[Tensor, "n d"], narrow: int, width: int) -> Float[Tensor, "m d"]:
    heads = weight.unflatten(0, (-1, narrow))
    return torch.nn.functional.pad(heads, (0, 0, 0, width - narrow)).flatten(0, 1)
