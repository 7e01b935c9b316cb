"""Gemma 4 and what is built from it: pictures of any grid, pooled by the places of their patches, padded and cut again.

gemma4: windows and full layers with heads of two sizes, inputs for each layer beside the embeddings, keys and values
of the last layers taken from layers before, and masks in which a picture's tokens see each other.
gemma4_moe: experts beside the MLP, values that are the keys, no inputs for each layer.
In both a picture's tokens see each other in windows only; full layers are causal.
gemma4_unified: no towers; patches, and frames of a sound, are projected one by one, and a picture's tokens see each
other in every layer.
diffusion_gemma: an encoder as that of gemma4_moe, and a decoder that reads its keys and values and denoises a canvas.
Features are a tuple with one tensor (tokens × hidden) for each picture, in diffusion_gemma one tensor for all. Masks
are made outside the language model, as a dict of 4-D masks; the encoder of diffusion_gemma makes one and then hands
the 2-D mask on, so that its language model makes causal ones.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
import transformers
from packaging.version import Version
from torch import Tensor, nn
from torch.nn.functional import pad
from transformers import (
    DiffusionGemmaConfig,
    DiffusionGemmaForBlockDiffusion,
    DiffusionGemmaTextConfig,
    Gemma4AudioConfig,
    Gemma4Config,
    Gemma4ForConditionalGeneration,
    Gemma4TextConfig,
    Gemma4UnifiedAudioConfig,
    Gemma4UnifiedConfig,
    Gemma4UnifiedForConditionalGeneration,
    Gemma4UnifiedTextConfig,
    Gemma4UnifiedVisionConfig,
    Gemma4VisionConfig,
)

from builds.build import Build, Inputs, Picture, by_name

IMAGE, START, END, VIDEO, SOUND, SOUND_START, SOUND_END = 250, 251, 252, 253, 240, 241, 242
PATCH, POOL, MOST = 4, 3, 20  # pixels, patches, tokens
GRIDS = {"A": (4, 5), "B": (3, 4), "C": (2, 7), "V": (2, 3)}  # tokens down and across; V has two frames
MEL, SOUNDS = 16, 10
CANVAS = 8


def mixed(layers: int) -> list[str]:
    """Windows and full layers in turn; the last is full, as the class wants it."""
    return ["full_attention" if i % 2 or i == layers - 1 else "sliding_attention" for i in range(layers)]


def _settings(text: dict[str, Any], **special: Any) -> dict[str, Any]:
    settings = {
        "head_dim": 16,
        "global_head_dim": 32,
        "sliding_window": 12,
        "layer_types": mixed(text["num_hidden_layers"]),
        "use_bidirectional_attention": "vision",
        "final_logit_softcapping": 30.0,
        "tie_word_embeddings": False,
    }
    return settings | special | text


def _tower() -> Gemma4VisionConfig:
    return Gemma4VisionConfig(
        hidden_size=48,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=4,
        head_dim=12,
        patch_size=PATCH,
        pooling_kernel_size=POOL,
        position_embedding_size=64,
    )


MARKERS = {"image_token_id": IMAGE, "boi_token_id": START, "eoi_token_id": END, "tie_word_embeddings": False}
OTHER_MARKERS = {
    "video_token_id": VIDEO,
    "audio_token_id": SOUND,
    "boa_token_id": SOUND_START,
    "eoa_token_index": SOUND_END,
}
MOE = {"num_global_key_value_heads": 1, "num_experts": 4, "top_k_experts": 2, "moe_intermediate_size": 32}


def _gemma4(text: dict[str, Any]) -> nn.Module:
    return _with_towers(
        _settings(
            text,
            vocab_size_per_layer_input=text["vocab_size"],
            hidden_size_per_layer_input=16,
            num_kv_shared_layers=max(0, min(2, text["num_hidden_layers"] - 2)),
            use_double_wide_mlp=True,
        )
    )


def _gemma4_moe(text: dict[str, Any]) -> nn.Module:
    special = {"hidden_size_per_layer_input": 0, "attention_k_eq_v": True, "enable_moe_block": True}
    return _with_towers(_settings(text, **special, **MOE))


def _with_towers(settings: dict[str, Any]) -> nn.Module:
    audio = Gemma4AudioConfig(
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        subsampling_conv_channels=[MEL, 8],
        output_proj_dims=48,
    )
    config = Gemma4Config(
        text_config=Gemma4TextConfig(**settings),
        vision_config=_tower(),
        audio_config=audio,
        **MARKERS,
        **OTHER_MARKERS,
    )
    return Gemma4ForConditionalGeneration(config)


def _gemma4_unified(text: dict[str, Any]) -> nn.Module:
    vision = Gemma4UnifiedVisionConfig(
        patch_size=PATCH, pooling_kernel_size=POOL, mm_embed_dim=48, mm_posemb_size=16, output_proj_dims=48
    )
    config = Gemma4UnifiedConfig(
        text_config=Gemma4UnifiedTextConfig(**_settings(text, attention_k_eq_v=True, num_global_key_value_heads=1)),
        vision_config=vision,
        audio_config=Gemma4UnifiedAudioConfig(audio_embed_dim=MEL),
        **MARKERS,
        **OTHER_MARKERS,
    )
    return Gemma4UnifiedForConditionalGeneration(config)


def _diffusion_gemma(text: dict[str, Any]) -> nn.Module:
    config = DiffusionGemmaConfig(
        text_config=DiffusionGemmaTextConfig(**_settings(text, **MOE)),
        vision_config=_tower(),
        canvas_length=CANVAS,
        **MARKERS,
    )
    return DiffusionGemmaForBlockDiffusion(config)


def patches(letter: str, pool: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """A picture of `pool` patches a side for each token: pixels (1 × patches × values) and places (1 × patches × 2:
    across, down), padded to the most."""
    rows, columns = (pool * n for n in GRIDS[letter])
    side = PATCH * POOL // pool
    pixels = torch.rand(1, rows * columns, 3 * side * side, generator=generator)
    places = torch.cartesian_prod(torch.arange(rows), torch.arange(columns)).flip(1)[None]
    gap = MOST * pool * pool - rows * columns
    return pad(pixels, (0, 0, 0, gap)), pad(places, (0, 0, 0, gap), value=-1)


def _picture(pool: int, frames: int, letter: str, generator: torch.Generator) -> Picture:
    """`pool` is that of the tower; `frames` is how many frames of a sound become a token."""
    if letter == "U":
        length = SOUNDS * frames
        sound = torch.randn(1, length, MEL, generator=generator)
        ids = [SOUND_START, *[SOUND] * SOUNDS, SOUND_END]
        return ids, {"input_features": sound, "input_features_mask": torch.ones(1, length, dtype=torch.bool)}
    rows, columns = GRIDS[letter]
    if letter == "V":
        parts = [patches("V", pool, generator) for _ in range(2)]
        ids = [20, START, *[VIDEO] * rows * columns, END] * 2  # a time stands before each frame
        return ids, {
            "pixel_values_videos": torch.cat([pixels for pixels, _ in parts]),
            "video_position_ids": torch.cat([places for _, places in parts]),
            "num_frames_per_video": torch.tensor([2]),
        }
    pixels, places = patches(letter, pool, generator)
    return [START, *[IMAGE] * rows * columns, END], {"pixel_values": pixels, "image_position_ids": places}


def _completed(inputs: Inputs) -> Inputs:
    ids = inputs["input_ids"]
    return inputs | {"mm_token_type_ids": (ids == IMAGE) + 2 * (ids == VIDEO) + 3 * (ids == SOUND)}


def _with_canvas(inputs: Inputs) -> Inputs:
    return _completed(inputs) | {"decoder_input_ids": torch.arange(20, 20 + CANVAS)[None]}


# Older forwards take the numbers of frames and do not hand them on, so that every video is refused.
LETTERS = "ABCVU" if Version(transformers.__version__) >= Version("5.24") else "ABCU"


TOWER = functools.partial(_picture, POOL, 4)
TYPES = {"joined": by_name, "per_token": ("mm_token_type_ids",)}

BUILDS = (
    Build("gemma4", "gemma4", _gemma4, TOWER, LETTERS, completed=_completed, **TYPES),
    Build("gemma4_moe", "gemma4", _gemma4_moe, TOWER, LETTERS, completed=_completed, **TYPES),
    Build(
        "gemma4_unified",
        "gemma4_unified",
        _gemma4_unified,
        functools.partial(_picture, 1, 1),
        LETTERS,
        completed=_completed,
        **TYPES,
    ),
    Build(
        "diffusion_gemma",
        "diffusion_gemma",
        _diffusion_gemma,
        TOWER,
        completed=_with_canvas,
        padding=None,
        cannot="Pictures lie in the sequence of an encoder, of which a second language model reads keys and values "
        "while it denoises a canvas; the logits are the canvas's.",
        **TYPES,
    ),
)
