"""Nemotron Omni: a RADIO tower over grids of flat patches, of which 2 × 2 become one token, and a language model whose
blocks are each a Mamba mixer, attention without positions, experts or an MLP.

There is no base model: the class holds the tower, projectors and a causal language model. A video's placeholders are
those of pictures, so that a batch may hold pictures or a video but not both. Features are a tuple with one tensor
(tokens × hidden) for each picture, and one tensor (groups of frames × tokens × hidden) for the videos. Masks are made
inside the language model: 4-D for attention, 2-D for mixers.
"""

from __future__ import annotations

from typing import Any

import torch
import transformers
from packaging.version import Version
from torch import nn
from transformers import NemotronH_Omni_Reasoning_V3, NemotronH_Omni_Reasoning_V3_Config

from builds.build import TEXT, Build, Picture
from builds.joining import padded

IMAGE, START, END, SOUND, SOUND_START, SOUND_END = 250, 251, 252, 240, 241, 242
PATCH, MERGE, FRAMES = 4, 2, 2
GRIDS = {"A": (10, 8), "B": (4, 14), "C": (8, 6), "V": (6, 8)}  # patches down and across; V has two groups of frames
MEL, LENGTH, SOUNDS = 16, 64, 8
# Older forwards take a video's features for a list of tensors and refuse every video.
LETTERS = "ABCVU" if Version(transformers.__version__) >= Version("5.24") else "ABCU"
BLOCKS = ("linear_attention", "full_attention", "moe", "mlp")


def _nemotron(text: dict[str, Any]) -> nn.Module:
    layers = text["num_hidden_layers"]
    settings = {
        "layers_block_type": [BLOCKS[i % len(BLOCKS)] for i in range(layers)],
        "head_dim": 16,
        "ssm_state_size": 16,
        "mamba_num_heads": 8,
        "mamba_head_dim": 16,
        "n_groups": 2,
        "chunk_size": 16,
        "n_routed_experts": 4,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 32,
        "moe_shared_expert_intermediate_size": 32,
    }
    config = NemotronH_Omni_Reasoning_V3_Config(
        text_config={name: value for name, value in (settings | text).items() if name != "num_hidden_layers"},
        vision_config={
            "hidden_size": 48,
            "num_hidden_layers": 3,
            "num_attention_heads": 4,
            "mlp_ratio": 2.0,
            "patch_size": PATCH,
            "image_size": 8 * PATCH,
            "max_img_size": 16 * PATCH,
            "num_cls_tokens": 2,
            "num_registers": 2,
            "video_temporal_patch_size": FRAMES,
        },
        audio_config={
            "hidden_size": 32,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "intermediate_size": 64,
            "subsampling_conv_channels": 8,
            "num_mel_bins": MEL,
            "projection_hidden_size": 64,
            "projection_bias": False,
        },
        video_temporal_patch_size=FRAMES,
        vision_hidden_size=48,
        projector_hidden_size=64,
        image_token_id=IMAGE,
        video_token_id=IMAGE,
        audio_token_id=SOUND,
    )
    model = NemotronH_Omni_Reasoning_V3(config)
    # The class does not name its head, so that what a build does to keep placeholders unsaid does not reach it.
    model.generation_config.suppress_tokens = list(range(TEXT[1], text["vocab_size"]))
    return model


def _picture(letter: str, generator: torch.Generator) -> Picture:
    if letter == "U":
        sound = torch.randn(1, LENGTH, MEL, generator=generator)
        ids = [SOUND_START, *[SOUND] * SOUNDS, SOUND_END]
        return ids, {"input_features": sound, "input_features_mask": torch.ones(1, LENGTH, dtype=torch.int64)}
    down, across = GRIDS[letter]
    run = [START, *[IMAGE] * (down * across // MERGE**2), END]
    if letter == "V":
        frames = torch.randn(2 * FRAMES, 3, down * PATCH, across * PATCH, generator=generator)
        return [20, *run, 21, *run], {"pixel_values_videos": frames}  # a time stands before each group
    pixels = torch.randn(down * across, 3 * PATCH * PATCH, generator=generator)
    return run, {"pixel_values": pixels, "image_grid_hw": torch.tensor([[down, across]])}


BUILDS = (Build("nemotron_h_omni", "nemotron_h_omni", _nemotron, _picture, LETTERS, padded),)
