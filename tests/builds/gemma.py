"""Gemma 3, PaliGemma and T5Gemma 2: SigLIP towers, and masks in which a picture's tokens see each other.

gemma3: pooled tokens of the tower, sliding windows. shieldgemma2 is the same class with a configuration of its own.
paligemma: the whole prompt is one block of tokens that see each other; positions begin at 1; full layers only.
paligemma2: the same over Gemma 2, whose layers alternate between windows and full, with soft caps on attention.
t5gemma2: an encoder that reads pictures and text in both directions, and a decoder that reads the encoder's states.
Features are a tensor (pictures × tokens × hidden). Masks are made outside the language model: a 4-D tensor in
paligemma, a dict by kind of layer in the others.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import nn
from transformers import (
    Gemma2Config,
    Gemma3Config,
    Gemma3ForConditionalGeneration,
    Gemma3TextConfig,
    GemmaConfig,
    PaliGemmaConfig,
    PaliGemmaForConditionalGeneration,
    PreTrainedConfig,
    ShieldGemma2Config,
    SiglipVisionConfig,
    T5Gemma2Config,
    T5Gemma2DecoderConfig,
    T5Gemma2EncoderConfig,
    T5Gemma2ForConditionalGeneration,
    T5Gemma2TextConfig,
)

from builds.build import BOS, Build, Inputs, Picture, by_name
from builds.towers import tower

IMAGE, START, END = 250, 251, 252
SIDE, PATCH, TOKENS = 56, 7, 16  # 8 × 8 patches, pooled to 4 × 4 tokens
PALI_PATCH = 14  # 4 × 4 patches, each a token
GEMMA = {"head_dim": 16, "sliding_window": 12, "query_pre_attn_scalar": 16, "tie_word_embeddings": False}


def _tower(patch: int) -> SiglipVisionConfig:
    return SiglipVisionConfig(**tower(SIDE, patch), vision_use_head=False)


def _alternating(layers: int) -> list[str]:
    return ["full_attention" if i % 2 else "sliding_attention" for i in range(layers)]


def _gemma3(configuration: type[PreTrainedConfig], text: dict[str, Any]) -> nn.Module:
    kinds = {"layer_types": _alternating(text["num_hidden_layers"])}
    config = configuration(
        text_config=Gemma3TextConfig(**GEMMA | kinds | text),
        vision_config=_tower(PATCH),
        mm_tokens_per_image=TOKENS,
        image_token_index=IMAGE,
        boi_token_index=START,
        eoi_token_index=END,
        tie_word_embeddings=False,
    )
    return Gemma3ForConditionalGeneration(config)


def _paligemma(text: dict[str, Any]) -> nn.Module:
    return _pali(GemmaConfig(head_dim=16, tie_word_embeddings=False, **text))


def _paligemma2(text: dict[str, Any]) -> nn.Module:
    kinds = {"layer_types": _alternating(text["num_hidden_layers"])}
    return _pali(Gemma2Config(**GEMMA | kinds | text))


def _pali(language: PreTrainedConfig) -> nn.Module:
    config = PaliGemmaConfig(
        text_config=language,
        vision_config=_tower(PALI_PATCH),
        image_token_index=IMAGE,
        projection_dim=language.hidden_size,
        hidden_size=language.hidden_size,
        vocab_size=language.vocab_size,
        tie_word_embeddings=False,
    )
    return PaliGemmaForConditionalGeneration(config)


def _t5gemma2(text: dict[str, Any]) -> nn.Module:
    settings = GEMMA | {"layer_types": _alternating(text["num_hidden_layers"])} | text
    encoder = T5Gemma2EncoderConfig(
        text_config=T5Gemma2TextConfig(**settings),
        vision_config=_tower(PATCH),
        mm_tokens_per_image=TOKENS,
        image_token_index=IMAGE,
        boi_token_index=START,
        eoi_token_index=END,
        tie_word_embeddings=False,
    )
    decoder = T5Gemma2DecoderConfig(**settings)
    config = T5Gemma2Config(encoder=encoder, decoder=decoder, image_token_index=IMAGE, tie_word_embeddings=False)
    return T5Gemma2ForConditionalGeneration(config)


def _pixels(generator: torch.Generator) -> Inputs:
    return {"pixel_values": torch.randn(1, 3, SIDE, SIDE, generator=generator)}


def _picture(letter: str, generator: torch.Generator) -> Picture:
    return [START, *[IMAGE] * TOKENS, END], _pixels(generator)


def _bare_picture(letter: str, generator: torch.Generator) -> Picture:
    return [IMAGE] * TOKENS, _pixels(generator)


def _completed(inputs: Inputs) -> Inputs:
    return inputs | {"token_type_ids": (inputs["input_ids"] == IMAGE).long()}


def _prefix(inputs: Inputs) -> Inputs:
    """The prompt is all prefix: 0; only what a suffix to learn from would hold is 1."""
    return inputs | {"token_type_ids": torch.zeros_like(inputs["input_ids"])}


def _with_start(inputs: Inputs) -> Inputs:
    return inputs | {"decoder_input_ids": torch.tensor([[BOS]])}


TYPES = ("token_type_ids",)

BUILDS = (
    Build(
        "gemma3",
        "gemma3",
        functools.partial(_gemma3, Gemma3Config),
        _picture,
        completed=_completed,
        per_token=TYPES,
    ),
    Build(
        "shieldgemma2",
        "shieldgemma2",
        functools.partial(_gemma3, ShieldGemma2Config),
        _picture,
        completed=_completed,
        per_token=TYPES,
    ),
    Build("paligemma", "paligemma", _paligemma, _bare_picture, completed=_prefix, per_token=TYPES),
    Build("paligemma2", "paligemma", _paligemma2, _bare_picture, completed=_prefix, per_token=TYPES),
    Build(
        "t5gemma2",
        "t5gemma2",
        _t5gemma2,
        _picture,
        joined=by_name,
        completed=_with_start,
        cannot="Pictures lie in the sequence of an encoder that reads in both directions; the language model that "
        "answers reads the encoder's states by attention.",
    ),
)
