"""Inkling: a picture is its patches in a row, each folded to one token, without markers; a sound is mel bins.

Every layer has four short convolutions over the sequence (of keys, of values, of what attention and the MLP say) beside
attention with a window or full; positions are relative, with learned logits for the nearest keys; experts.
Features are a tensor (patches of all pictures × 1 × hidden). Masks are made outside the language model, as a dict of
two 4-D masks and a 2-D one for convolutions.
Batches are padded on the right: full layers scale by the place of a query in the padded row.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from transformers import InklingConfig, InklingForConditionalGeneration

from builds.build import Build, Picture
from builds.joining import padded

IMAGE, SOUND = 250, 251
PATCH, FRAMES = 4, 2
PATCHES = {"A": 20, "B": 15, "C": 8}
BINS, LEVELS, LENGTH = 4, 8, 10


def _inkling(text: dict[str, Any]) -> nn.Module:
    layers = text["num_hidden_layers"]
    settings = {
        "head_dim": 16,
        "swa_num_attention_heads": text["num_attention_heads"],
        "swa_num_key_value_heads": text["num_attention_heads"],
        "swa_head_dim": 16,
        "sliding_window_size": 12,
        "d_rel": 4,
        "rel_extent": 16,
        "log_scaling_n_floor": 8,
        "layer_types": ["hybrid" if i % 2 else "hybrid_sliding" for i in range(layers)],
        "mlp_layer_types": ["sparse" if i % 2 else "dense" for i in range(layers)],
        "moe_intermediate_size": 32,
        "n_routed_experts": 4,
        "num_experts_per_tok": 2,
        "n_shared_experts": 1,
        "logits_mup_width_multiplier": 1.0,
    }
    config = InklingConfig(
        text_config=settings | text,
        audio_config={"n_mel_bins": BINS, "mel_vocab_size": LEVELS},
        vision_config={"patch_size": PATCH, "temporal_patch_size": FRAMES, "num_hidden_layers": 4},
        image_token_id=IMAGE,
        audio_token_id=SOUND,
    )
    return InklingForConditionalGeneration(config)


def _picture(letter: str, generator: torch.Generator) -> Picture:
    if letter == "U":
        bins = torch.randint(LEVELS, (1, LENGTH, BINS), generator=generator)
        return [SOUND] * LENGTH, {"audio_input_ids": bins, "audio_input_ids_mask": torch.ones(1, LENGTH).long()}
    patches = PATCHES[letter]
    pixels = torch.randn(patches, FRAMES, PATCH, PATCH, 3, generator=generator)
    return [IMAGE] * patches, {"pixel_values": pixels}


BUILDS = (Build("inkling", "inkling_mm_model", _inkling, _picture, "ABCU", padded, padding="right"),)
