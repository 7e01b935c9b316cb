"""Qwen-VL and classes made of its parts: grids of patches, M-RoPE positions made from token types.

Masks are made inside the language model, from a 2-D mask; features are one (tokens, hidden) tensor for each picture.
- qwen2_vl: full attention in the vision encoder; here the upper half of the layers has sliding windows.
- qwen3_vl and qwen3_vl_moe: deepstack. Features of lower vision blocks are added to the hidden states of the first
  layers at the places of `visual_pos_masks`. Interleaved M-RoPE; each frame of a video stands apart.
- qwen3_5 and qwen3_5_moe: gated delta-net layers (`linear_attention`) between full ones; no deepstack.
- cosmos3_omni: the parts of Qwen3-VL under another model.
- exaone4_5: an EXAONE 4 language model: plain positions; sliding layers rotate, full layers have no positions. Its
  vision encoder has windows and grouped keys.
"""

from __future__ import annotations

from typing import Any

from torch import nn
from transformers import (
    Cosmos3OmniConfig,
    Cosmos3OmniForConditionalGeneration,
    Exaone4_5_Config,
    Exaone4_5_ForConditionalGeneration,
    Qwen2VLConfig,
    Qwen2VLForConditionalGeneration,
    Qwen3_5Config,
    Qwen3_5ForConditionalGeneration,
    Qwen3_5MoeConfig,
    Qwen3_5MoeForConditionalGeneration,
    Qwen3VLConfig,
    Qwen3VLForConditionalGeneration,
    Qwen3VLMoeConfig,
    Qwen3VLMoeForConditionalGeneration,
)

from builds.build import Build, by_name
from builds.grids import IMAGE, MROPE, PATCH, TYPED, VIDEO, VISION_IDS, in_frames, in_run, pictures, tower

WINDOW = 12
INTERLEAVED = MROPE | {"mrope_section": [3, 3, 2], "mrope_interleaved": True}
EXPERTS = {"moe_intermediate_size": 32, "num_experts": 4, "num_experts_per_tok": 2}
DELTA_NET = {
    "head_dim": 32,
    "linear_key_head_dim": 16,
    "linear_value_head_dim": 16,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "full_attention_interval": 2,
    "rope_parameters": INTERLEAVED | {"mrope_section": [2, 1, 1], "partial_rotary_factor": 0.25},
}


def _qwen2_vl(text: dict[str, Any]) -> nn.Module:
    settings = {"use_sliding_window": True, "sliding_window": WINDOW, "rope_parameters": MROPE} | text
    settings.setdefault("max_window_layers", settings["num_hidden_layers"] // 2)
    vision = {"depth": 3, "embed_dim": 48, "hidden_size": settings["hidden_size"], "num_heads": 4, "mlp_ratio": 2}
    config = Qwen2VLConfig(text_config=settings, vision_config=vision | {"patch_size": PATCH}, **VISION_IDS)
    return Qwen2VLForConditionalGeneration(config)


def _deepstack(config: type, model: type, text: dict[str, Any], **own: Any) -> nn.Module:
    settings = {"head_dim": 16, "rope_parameters": INTERLEAVED} | own | text
    vision = tower(out_hidden_size=settings["hidden_size"], num_position_embeddings=36, deepstack_visual_indexes=[0, 1])
    return model(config(text_config=settings, vision_config=vision, **VISION_IDS))


def _hybrid(config: type, model: type, text: dict[str, Any], **own: Any) -> nn.Module:
    settings = DELTA_NET | own | text
    vision = tower(out_hidden_size=settings["hidden_size"], num_position_embeddings=36)
    return model(config(text_config=settings, vision_config=vision, **VISION_IDS))


def _qwen3_vl(text: dict[str, Any]) -> nn.Module:
    return _deepstack(Qwen3VLConfig, Qwen3VLForConditionalGeneration, text)


def _qwen3_vl_moe(text: dict[str, Any]) -> nn.Module:
    return _deepstack(
        Qwen3VLMoeConfig,
        Qwen3VLMoeForConditionalGeneration,
        text,
        mlp_only_layers=[0],
        tie_word_embeddings=False,
        **EXPERTS,
    )


def _cosmos3_omni(text: dict[str, Any]) -> nn.Module:
    return _deepstack(Cosmos3OmniConfig, Cosmos3OmniForConditionalGeneration, text)


def _qwen3_5(text: dict[str, Any]) -> nn.Module:
    return _hybrid(Qwen3_5Config, Qwen3_5ForConditionalGeneration, text)


def _qwen3_5_moe(text: dict[str, Any]) -> nn.Module:
    own = EXPERTS | {"shared_expert_intermediate_size": 32}
    return _hybrid(Qwen3_5MoeConfig, Qwen3_5MoeForConditionalGeneration, text, **own)


def _exaone4_5(text: dict[str, Any]) -> nn.Module:
    settings = {"model_type": "exaone4", "sliding_window": WINDOW, "sliding_window_pattern": 2} | text
    vision = tower(
        depth=4,
        out_hidden_size=settings["hidden_size"],
        num_key_value_heads=2,
        window_size=4 * PATCH,
        fullatt_block_indexes=[1, 3],
    )
    config = Exaone4_5_Config(text_config=settings, vision_config=vision, image_token_id=IMAGE, video_token_id=VIDEO)
    return Exaone4_5_ForConditionalGeneration(config)


FRAMES: dict[str, Any] = {"picture": pictures(in_frames), "letters": "ABCV", **TYPED}

BUILDS = (
    Build("qwen3_vl", "qwen3_vl", _qwen3_vl, **FRAMES),
    Build("qwen2_vl", "qwen2_vl", _qwen2_vl, pictures(in_run), letters="ABCV", **TYPED),
    Build("qwen3_vl_moe", "qwen3_vl_moe", _qwen3_vl_moe, **FRAMES),
    Build("qwen3_5", "qwen3_5", _qwen3_5, **FRAMES),
    Build("qwen3_5_moe", "qwen3_5_moe", _qwen3_5_moe, **FRAMES),
    Build("cosmos3_omni", "cosmos3_omni", _cosmos3_omni, **FRAMES),
    Build("exaone4_5", "exaone4_5", _exaone4_5, pictures(in_run), letters="ABCV", joined=by_name),
)
