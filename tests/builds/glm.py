"""GLM-V: grids of patches with convolutions after the vision blocks, M-RoPE positions made from token types.

Features are one (tokens, hidden) tensor for each picture; masks are made inside the language model. A video is written
as pictures between two marks: the placeholders are those of pictures, and only token types tell them apart. All but
glm5_next count every placeholder as a picture's, and so fail on a batch that has both a picture and a video.
- glm4v, glm46v and glmga: four norms in a layer, rotation of a part of each head. glm46v and glmga have no language
  model of their own, and glmga shares the class of glm46v.
- glm4v_moe: experts from the second layer on.
- glm_ocr: norms of queries and keys in the vision encoder.
- glm5_next: four residual streams (hidden states are (batch, length, 4, hidden) inside layers), delta-net layers, and
  layers that attend to the keys an indexer selects; the next layer can share the selection, which is of key places.
  No rotation: it takes plain positions.
"""

from __future__ import annotations

from typing import Any

from torch import nn
from transformers import (
    Glm4vConfig,
    Glm4vForConditionalGeneration,
    Glm4vMoeConfig,
    Glm4vMoeForConditionalGeneration,
    Glm5NextConfig,
    Glm5NextForConditionalGeneration,
    Glm46VConfig,
    Glm46VForConditionalGeneration,
    GlmgaConfig,
    GlmOcrConfig,
    GlmOcrForConditionalGeneration,
)

from builds.build import Build
from builds.grids import (
    END,
    IMAGE,
    MROPE,
    PATCH,
    START,
    TYPED,
    VIDEO,
    VIDEO_END,
    VIDEO_START,
    in_pictures,
    pictures,
    tower,
)

IDS = {
    "image_token_id": IMAGE,
    "video_token_id": VIDEO,
    "image_start_token_id": START,
    "image_end_token_id": END,
    "video_start_token_id": VIDEO_START,
    "video_end_token_id": VIDEO_END,
}
PARTIAL = MROPE | {"mrope_section": [2, 1, 1], "partial_rotary_factor": 0.5}


def _glm(config: type, model: type, text: dict[str, Any], **own: Any) -> nn.Module:
    settings = {"rope_parameters": PARTIAL} | own | text
    vision = tower(image_size=6 * PATCH, out_hidden_size=settings["hidden_size"])
    return model(config(text_config=settings, vision_config=vision, **IDS))


def _glm4v(text: dict[str, Any]) -> nn.Module:
    return _glm(Glm4vConfig, Glm4vForConditionalGeneration, text)


def _glm46v(text: dict[str, Any]) -> nn.Module:
    return _glm(Glm46VConfig, Glm46VForConditionalGeneration, text)


def _glmga(text: dict[str, Any]) -> nn.Module:
    return _glm(GlmgaConfig, Glm46VForConditionalGeneration, text)


def _glm4v_moe(text: dict[str, Any]) -> nn.Module:
    own = {"moe_intermediate_size": 32, "n_routed_experts": 4, "num_experts_per_tok": 2}
    return _glm(Glm4vMoeConfig, Glm4vMoeForConditionalGeneration, text, **own)


def _glm_ocr(text: dict[str, Any]) -> nn.Module:
    return _glm(GlmOcrConfig, GlmOcrForConditionalGeneration, text, head_dim=16)


def _glm5_next(text: dict[str, Any]) -> nn.Module:
    layers = range(text["num_hidden_layers"])
    settings = {
        "moe_intermediate_size": 32,
        "n_routed_experts": 4,
        "num_experts_per_tok": 2,
        "mlp_layer_types": ["sparse" if i else "dense" for i in layers],
        "layer_types": ["indexed_attention" if i % 4 in (1, 2) else "linear_attention" for i in layers],
        "indexer_types": ["shared" if i % 4 == 2 else "full" for i in layers],
        "index_topk": 16,
        "index_kpool": 4,
        "index_head_dim": 16,
        "index_n_heads": 8,  # with fewer, many scores are exactly 0, and which of equal ones is selected is chance
        "kv_lora_rank": 16,
        "q_lora_rank": 24,
        "v_head_dim": 16,
        "qk_nope_head_dim": 16,
        "linear_head_dim": 16,
        "linear_num_heads": 4,
    } | text
    settings["num_key_value_heads"] = settings["num_attention_heads"]
    vision = tower(image_size=6 * PATCH, out_hidden_size=settings["hidden_size"], projection_intermediate_size=96)
    return Glm5NextForConditionalGeneration(Glm5NextConfig(text_config=settings, vision_config=vision, **IDS))


GLM: dict[str, Any] = {"picture": pictures(in_pictures), "letters": "ABCV", **TYPED}

BUILDS = (
    Build("glm4v", "glm4v", _glm4v, **GLM),
    Build("glm46v", "glm46v", _glm46v, **GLM),
    Build("glm4v_moe", "glm4v_moe", _glm4v_moe, **GLM),
    Build("glm_ocr", "glm_ocr", _glm_ocr, **GLM),
    Build("glmga", "glmga", _glmga, **GLM),
    Build("glm5_next", "glm5_next", _glm5_next, **GLM),
)
