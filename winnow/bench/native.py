"""native-M: the untouched model, fed M of the embeddings of its picture; and batches of unequal prompts."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers.modeling_outputs import BaseModelOutputWithPooling

from winnow.bench.requests import PIXELS
from winnow.core.errors import UnsupportedError

Inputs = dict[str, Any]


def lengths_of(rows: Sequence[Inputs]) -> list[int]:
    return [row["input_ids"].shape[1] for row in rows]


def padded(rows: Sequence[Inputs], pad: int) -> Inputs:
    """One batch, left-padded to its longest row; tiles are padded to the largest number."""
    width = max(lengths_of(rows))
    batch: Inputs = {}
    for name in rows[0]:
        parts = [row[name] for row in rows]
        if name in ("input_ids", "attention_mask", "mm_token_type_ids", "token_type_ids"):
            fill = pad if name == "input_ids" else 0
            parts = [torch.nn.functional.pad(x, (width - x.shape[1], 0), value=fill) for x in parts]
        elif parts[0].ndim == 5:
            most = max(x.shape[1] for x in parts)
            parts = [torch.nn.functional.pad(x, (0, 0) * 3 + (0, most - x.shape[1])) for x in parts]
        batch[name] = torch.cat(parts)
    return batch


def shortened(model: Any, row: Inputs, m: int) -> Inputs:
    """A prompt with M placeholders for its picture, without pixels."""
    ids = row["input_ids"][0]
    at = (ids == model.config.image_token_id).nonzero()[:, 0]
    if not len(at) or int(at[-1] - at[0]) + 1 != len(at):
        raise UnsupportedError("native-M needs a prompt with one picture, whose placeholders stand together.")
    stay = torch.ones(len(ids), dtype=torch.bool, device=ids.device)
    stay[at[min(m, len(at)) :]] = False
    found = {
        name: x[:, stay] for name, x in row.items() if name not in PIXELS and x.ndim == 2 and x.shape[1] == len(ids)
    }
    if "image_grid_thw" in row:  # 3-D positions are made from the grid
        merge = model.config.vision_config.spatial_merge_size
        high = next(d for d in range(math.isqrt(m), 0, -1) if m % d == 0)
        found["image_grid_thw"] = torch.tensor([[1, high * merge, m // high * merge]], device=ids.device)
    return found


def fed(model: Any, whole: Inputs, short: Inputs, rows: Sequence[Inputs], m: int) -> Inputs:
    """Encode the pictures of a batch in full, and hand on the first M embeddings of each."""
    names = [n for n in ("pixel_values", "image_sizes", "image_grid_thw") if n in whole]
    output = model.base_model.get_image_features(**{n: whole[n] for n in names}, return_dict=True)
    features: list[Tensor] = [x.reshape(-1, x.shape[-1])[:m] for x in output.pooler_output]
    if len(features) != len(rows):
        raise UnsupportedError(f"{len(rows)} questions gave {len(features)} pictures; each needs exactly one.")
    output = BaseModelOutputWithPooling(pooler_output=features)  # type: ignore[arg-type]
    return short | {"mm_encoder_outputs": {"image": output}}
