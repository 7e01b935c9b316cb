"""Classes with a Pixtral tower: pictures of any size, padded to the largest of the batch, whose patches are merged.

mistral3: each row of tokens ends with a token of its own; every layer has a window shorter than the prompt.
mistral3_full: the same without windows, as most checkpoints have it.
mistral3_latent: over Mistral 4, whose keys and values come from one latent for each token, with experts, and queries
scaled by position; batches are padded on the right, as a forward without positions counts padding on the left.
mistral4: that language model alone, which transformers' table of image-text-to-text classes names.
lighton_ocr: over Qwen 3, and a picture is its tokens and nothing else.
Features are a tuple with one tensor (tokens × hidden) for each picture. Masks are made inside the language model.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import nn
from transformers import (
    LightOnOcrConfig,
    LightOnOcrForConditionalGeneration,
    Mistral3Config,
    Mistral3ForConditionalGeneration,
    Mistral4Config,
    Mistral4ForCausalLM,
    MistralConfig,
    PixtralVisionConfig,
    PreTrainedConfig,
    Qwen3Config,
)

from builds.build import Build, Inputs, Picture
from builds.joining import padded
from builds.towers import tower

IMAGE, ROW_END, END = 250, 251, 252
PATCH, MERGE = 7, 2
GRIDS = {"A": (4, 5), "B": (3, 6), "C": (2, 4)}  # tokens down and across


def _tower() -> PixtralVisionConfig:
    return PixtralVisionConfig(**tower(12 * PATCH, PATCH))


def _mistral3(window: int | None, text: dict[str, Any]) -> nn.Module:
    return _around(MistralConfig(head_dim=16, **{"sliding_window": window} | text))


def _mistral3_latent(text: dict[str, Any]) -> nn.Module:
    return _around(_latent(text))


def _around(language: PreTrainedConfig) -> nn.Module:
    config = Mistral3Config(
        text_config=language,
        vision_config=_tower(),
        image_token_index=IMAGE,
        spatial_merge_size=MERGE,
        tie_word_embeddings=False,
    )
    return Mistral3ForConditionalGeneration(config)


def _mistral4(text: dict[str, Any]) -> nn.Module:
    return Mistral4ForCausalLM(_latent(text))


def _latent(text: dict[str, Any]) -> PreTrainedConfig:
    settings = {
        "moe_intermediate_size": 32,
        "n_routed_experts": 4,
        "num_experts_per_tok": 2,
        "first_k_dense_replace": 1,
        "kv_lora_rank": 16,
        "q_lora_rank": 32,
        "qk_rope_head_dim": 8,
        "qk_nope_head_dim": 8,
        "v_head_dim": 16,
        "rope_parameters": {
            "rope_type": "yarn",
            "rope_theta": 10000.0,
            "factor": 256.0,
            "original_max_position_embeddings": 16,  # so that the scale of queries changes within a prompt
            "beta_fast": 32.0,
            "beta_slow": 1.0,
            "mscale": 1.0,
            "mscale_all_dim": 1.0,
            "llama_4_scaling_beta": 0.1,
        },
    }
    return Mistral4Config(**settings | text | {"num_key_value_heads": text["num_attention_heads"]})


def _lighton_ocr(text: dict[str, Any]) -> nn.Module:
    config = LightOnOcrConfig(
        text_config=Qwen3Config(head_dim=16, **text),
        vision_config=_tower(),
        image_token_id=IMAGE,
        spatial_merge_size=MERGE,
        tie_word_embeddings=False,
    )
    return LightOnOcrForConditionalGeneration(config)


def _tensors(letter: str, generator: torch.Generator) -> Inputs:
    height, width = (n * MERGE * PATCH for n in GRIDS[letter])
    pixels = torch.randn(1, 3, height, width, generator=generator)
    return {"pixel_values": pixels, "image_sizes": torch.tensor([[height, width]])}


def _rows(letter: str, generator: torch.Generator) -> Picture:
    down, across = GRIDS[letter]
    ids = [*[IMAGE] * across, ROW_END] * down
    return [*ids[:-1], END], _tensors(letter, generator)


def _bare(letter: str, generator: torch.Generator) -> Picture:
    down, across = GRIDS[letter]
    return [IMAGE] * down * across, _tensors(letter, generator)


def _no_tensors(letter: str, generator: torch.Generator) -> Picture:
    return _rows(letter, generator)[0], {}


BUILDS = (
    Build("mistral3", "mistral3", functools.partial(_mistral3, 12), _rows, joined=padded),
    Build("mistral3_full", "mistral3", functools.partial(_mistral3, None), _rows, joined=padded),
    Build("mistral3_latent", "mistral3", _mistral3_latent, _rows, joined=padded, padding="right"),
    Build(
        "mistral4",
        "mistral4",
        _mistral4,
        _no_tensors,
        padding="right",
        cannot="The class is a language model without a vision tower; Mistral3ForConditionalGeneration puts pictures "
        "into it.",
    ),
    Build("lighton_ocr", "lighton_ocr", _lighton_ocr, _bare, joined=padded),
)
