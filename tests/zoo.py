"""Tiny random-weight instances of the real transformers classes, and inputs for them.

A row of a batch is written as a string: `"3 A 6 B 2"` is three text tokens, picture A, six text tokens, picture B and
two text tokens. The letters differ in size where the class allows it (tiles, unpadding, grids), so rows are ragged;
V, W and X are videos, for Qwen2.5-VL only.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from typing import Any

import torch
import transformers
from clips import LENGTHS, scenes
from quick import Mould
from torch import Tensor, nn
from transformers import (
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaNextConfig,
    LlavaNextForConditionalGeneration,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    SiglipVisionConfig,
)

transformers.logging.set_verbosity_error()

BUILDS = ("llava_clip", "llava_siglip", "llava_next", "qwen2_5_vl")
WITH_CLS = ("llava_clip", "llava_next")

VOCABULARY, PAD, EOS, IMAGE, VIDEO, PICTURE_START, PICTURE_END = 256, 0, 1, 250, 251, 3, 4
SIDE = 70  # pixels of a CLIP or SigLIP tile: 5 × 5 patches, an odd grid, so that unpadding is not symmetric by luck
PATCH = 14
DEPTH = 4

RAGGED = ("3 A 6", "3 B 9", "3 C 5")
SINGLE = ("3 A 6",)
MIXED = ("3 A 6", "11", "2 B 4 C 5")  # one picture, none, two with text between them

PIXELS = ("pixel_values", "image_sizes", "image_grid_thw", "pixel_values_videos", "video_grid_thw")

# Height and width in tiles: each tile grid once, A and B unpadded; T is B turned, with as many content tokens.
_TILED = {"A": (2, 1.77), "B": (0.7, 2), "C": (2, 2), "T": (2, 0.7)}
# Patches. A and B leave windows that are not full, T is B turned; D is a single token, L is 576; V has two frames, and
# W and X are clips with a cut.
_GRIDS = {
    "A": (1, 10, 8),
    "B": (1, 4, 14),
    "C": (1, 8, 6),
    "T": (1, 14, 4),
    "D": (1, 2, 2),
    "L": (1, 48, 48),
    "V": (2, 6, 8),
    "W": (LENGTHS["W"][0], 4, 8),
    "X": (LENGTHS["X"][0], 4, 6),
}
VIDEOS = "VWX"


def model(
    build: str, *, dtype: torch.dtype = torch.float32, layers: int = DEPTH, seed: int = 0, side: int = SIDE, **text: Any
) -> nn.Module:
    """A new copy of a build in eval mode; `side` is that of a tile, `text` overrides the LM's configuration."""
    return _mould(build, dtype, layers, seed, side, tuple(sorted(text.items()))).copy()


@functools.cache
def _mould(
    build: str, dtype: torch.dtype, layers: int, seed: int, side: int, text: tuple[tuple[str, Any], ...]
) -> Mould:
    return Mould(_model(build, dtype, layers, seed, side, text))


def _model(
    build: str, dtype: torch.dtype, layers: int, seed: int, side: int, text: tuple[tuple[str, Any], ...]
) -> nn.Module:
    torch.manual_seed(seed)
    instance = _CLASSES[build](_text(layers, dict(text)), _tower(side))
    generator = torch.Generator().manual_seed(seed)
    for name, weight in instance.named_parameters():
        _fill(name, weight.data, generator)
    instance.lm_head.weight.data[[IMAGE, VIDEO]] = 0  # below the largest logit, so that no placeholder is ever said
    instance.generation_config.eos_token_id = None
    instance.generation_config.pad_token_id = PAD
    return instance.to(dtype).eval()


def _fill(name: str, weight: Tensor, generator: torch.Generator) -> None:
    """Weights that are larger than at the start of training: attention is peaky and no argmax hangs on rounding."""
    if weight.ndim == 1:
        if "norm" not in name:
            weight.normal_(0, 0.2, generator=generator)
    elif "embed_tokens" in name or "position_embedding" in name:
        weight.normal_(0, 0.5, generator=generator)
    else:
        weight.normal_(0, 1 / math.sqrt(weight[0].numel()), generator=generator)


def _text(layers: int, overrides: dict[str, Any]) -> dict[str, Any]:
    return {
        "vocab_size": VOCABULARY,
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": layers,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 4096,
        "pad_token_id": PAD,
        "bos_token_id": 2,
        "eos_token_id": EOS,
    } | overrides


def _tower(side: int) -> dict[str, int]:
    shape = {"hidden_size": 48, "intermediate_size": 96, "num_attention_heads": 4}
    return shape | {"image_size": side, "patch_size": PATCH}


def _llava_clip(text: dict[str, Any], tower: dict[str, int]) -> nn.Module:
    config = LlavaConfig(
        vision_config=CLIPVisionConfig(num_hidden_layers=5, projection_dim=48, **tower),
        text_config=LlamaConfig(**text),
        image_token_index=IMAGE,
        vision_feature_select_strategy="default",
        vision_feature_layer=-2,
    )
    return LlavaForConditionalGeneration(config)


def _llava_siglip(text: dict[str, Any], tower: dict[str, int]) -> nn.Module:
    config = LlavaConfig(
        vision_config=SiglipVisionConfig(num_hidden_layers=4, vision_use_head=False, **tower),
        text_config=LlamaConfig(**text),
        image_token_index=IMAGE,
        vision_feature_select_strategy="full",
        vision_feature_layer=-1,
    )
    return LlavaForConditionalGeneration(config)


def _llava_next(text: dict[str, Any], tower: dict[str, int]) -> nn.Module:
    side = tower["image_size"]
    config = LlavaNextConfig(
        vision_config=CLIPVisionConfig(num_hidden_layers=5, projection_dim=48, **tower),
        text_config=LlamaConfig(**text),
        image_token_index=IMAGE,
        image_grid_pinpoints=[[side, 2 * side], [2 * side, side], [2 * side, 2 * side]],
        vision_feature_select_strategy="default",
        vision_feature_layer=-2,
    )
    return LlavaNextForConditionalGeneration(config)


def _qwen2_5_vl(text: dict[str, Any], tower: dict[str, int]) -> nn.Module:
    rope = {"rope_type": "default", "mrope_section": [2, 3, 3], "rope_theta": 10000.0}
    config = Qwen2_5_VLConfig(
        text_config={"rope_parameters": rope} | text,
        vision_config={
            "depth": 4,
            "hidden_size": tower["hidden_size"],
            "out_hidden_size": text["hidden_size"],
            "num_heads": tower["num_attention_heads"],
            "patch_size": PATCH,
            "intermediate_size": tower["intermediate_size"],
            "window_size": 4 * PATCH,
            "fullatt_block_indexes": [1, 3],
        },
        image_token_id=IMAGE,
        video_token_id=VIDEO,
        vision_start_token_id=PICTURE_START,
        vision_end_token_id=PICTURE_END,
    )
    return Qwen2_5_VLForConditionalGeneration(config)


_CLASSES = {
    "llava_clip": _llava_clip,
    "llava_siglip": _llava_siglip,
    "llava_next": _llava_next,
    "qwen2_5_vl": _qwen2_5_vl,
}


def sample(
    build: str, row: str, *, seed: int = 0, dtype: torch.dtype = torch.float32, side: int = SIDE
) -> dict[str, Tensor]:
    """The inputs of one row alone, unpadded: batch size 1. Equal rows and seeds give equal inputs."""
    generator = torch.Generator().manual_seed(1000 * seed + sum(map(ord, row)))
    ids: list[int] = []
    pictures: list[dict[str, Tensor]] = []
    for word in row.split():
        if word.isdigit():
            ids += torch.randint(10, 200, (int(word),), generator=generator).tolist()
        else:
            placeholder = VIDEO if word in VIDEOS else IMAGE
            ids += [PICTURE_START, *[placeholder] * tokens_of(build, word, side), PICTURE_END]
            picture = _picture(build, word, side, generator)
            pictures.append({k: v.to(dtype) if v.is_floating_point() else v for k, v in picture.items()})
    inputs = {"input_ids": torch.tensor([ids]), "attention_mask": torch.ones(1, len(ids), dtype=torch.int64)}
    if build == "qwen2_5_vl":
        inputs["mm_token_type_ids"] = token_types(inputs["input_ids"])
    return inputs | joined(pictures)


def samples(build: str, rows: Sequence[str], *, seed: int = 0, **options: Any) -> list[dict[str, Tensor]]:
    """One sample for each row; equal rows at different places differ."""
    return [sample(build, row, seed=seed + i, **options) for i, row in enumerate(rows)]


def collate(parts: Sequence[dict[str, Tensor]], *, side: str = "left", extra: int = 0) -> dict[str, Tensor]:
    """One batch from samples, padded on a side to the longest row and `extra` more."""
    width = max(part["input_ids"].shape[1] for part in parts) + extra
    batch = {}
    for name, fill in (("input_ids", PAD), ("attention_mask", 0), ("mm_token_type_ids", 0)):
        if name in parts[0]:
            gaps = [width - part[name].shape[1] for part in parts]
            pads = [(gap, 0) if side == "left" else (0, gap) for gap in gaps]
            rows = [nn.functional.pad(part[name], pad, value=fill) for part, pad in zip(parts, pads, strict=True)]
            batch[name] = torch.cat(rows)
    return batch | joined([{k: part[k] for k in PIXELS if k in part} for part in parts])


def token_types(ids: Tensor) -> Tensor:
    """What Qwen2.5-VL wants to know of each token: text 0, image 1, video 2."""
    return ((ids == IMAGE) + 2 * (ids == VIDEO)).int()


def inputs(build: str, rows: Sequence[str], *, seed: int = 0, dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    """A left-padded batch of rows."""
    return collate(samples(build, rows, seed=seed, dtype=dtype))


@functools.cache
def tokens_of(build: str, letter: str, side: int = SIDE) -> int:
    """How many tokens a picture has in the LM, separators included; the class itself is asked."""
    picture = _picture(build, letter, side, torch.Generator().manual_seed(0))
    base = model(build, side=side).model  # a copy: a model that has run keeps hooks of transformers
    encode = base.get_video_features if letter in VIDEOS else base.get_image_features
    with torch.no_grad():
        return encode(**picture, return_dict=True).pooler_output[0].shape[0]


def _picture(build: str, letter: str, side: int, generator: torch.Generator) -> dict[str, Tensor]:
    if build == "qwen2_5_vl":
        grid = torch.tensor([_GRIDS[letter]])
        pixels = torch.randn(int(grid.prod()), 3 * 2 * PATCH * PATCH, generator=generator)
        if letter in LENGTHS:
            frames, cut = LENGTHS[letter]
            moving = torch.arange(len(pixels) // frames) // 4 % 3 == 0  # every third token; four patches make one
            pixels = scenes(pixels.unflatten(0, (frames, -1)), moving, cut).flatten(0, 1)
        if letter in VIDEOS:
            return {"pixel_values_videos": pixels, "video_grid_thw": grid}
        return {"pixel_values": pixels, "image_grid_thw": grid}
    if build == "llava_next":
        height, width = (round(side * part) for part in _TILED[letter])
        tiles = 1 + math.ceil(height / side) * math.ceil(width / side)
        pixels = torch.randn(1, tiles, 3, side, side, generator=generator)
        return {"pixel_values": pixels, "image_sizes": torch.tensor([[height, width]])}
    return {"pixel_values": torch.randn(1, 3, side, side, generator=generator)}


def joined(pictures: Sequence[dict[str, Tensor]]) -> dict[str, Tensor]:
    """Pictures one after the other; tiles are padded to the largest number, as the processor does."""
    joined = {}
    for name in PIXELS:
        parts = [picture[name] for picture in pictures if name in picture]
        if parts and parts[0].ndim == 5:
            most = max(part.shape[1] for part in parts)
            parts = [nn.functional.pad(part, (0, 0) * 3 + (0, most - part.shape[1])) for part in parts]
        if parts:
            joined[name] = torch.cat(parts)
    return joined
