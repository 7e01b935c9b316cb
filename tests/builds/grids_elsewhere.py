"""Classes of several makers that take grids of patches, and have little else in common.

Features are one (tokens, hidden) tensor for each picture; masks are made inside the language model.
- video_llama_3: a Qwen2 language model with plain positions. The merge size comes with each picture: C is not merged.
  A mask says which features of a video are kept, so features outnumber placeholders.
- paddleocr_vl: patches are (3, height, width); a projector outside the encoder merges them; no videos.
- ernie4_5_vl_moe: text and pictures have their own experts, chosen by `moe_mm_token_type_ids`, in which the marks of a
  picture count as picture; every layer gets them. A resampler outside the encoder merges frames of a video in pairs.
- kimi_k25: a DeepSeek-V3 language model: latent attention, experts, plain positions. The frames of a video are pooled
  to one. Older releases (5.19) split the features of several frames by a wrong number and fail, so V has one frame.
- cosmos3_edge: a SigLIP2 encoder, and a language model with squared ReLUs without gates.
- cohere_compass: Qwen3-VL's deepstack on a Cohere language model: attention and MLP side by side, sliding layers rotate
  and full layers have no positions. The rotation differs between releases (sections by turns in newer ones).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from transformers import (
    CohereCompassConfig,
    CohereCompassForConditionalGeneration,
    Cosmos3EdgeConfig,
    Cosmos3EdgeForConditionalGeneration,
    Ernie4_5_VLMoeConfig,
    Ernie4_5_VLMoeForConditionalGeneration,
    Kimi_K25Config,
    Kimi_K25ForConditionalGeneration,
    PaddleOCRVLConfig,
    PaddleOCRVLForConditionalGeneration,
    VideoLlama3Config,
    VideoLlama3ForConditionalGeneration,
)

from builds.build import TEXT, Build, Inputs, Picture, by_name
from builds.grids import (
    END,
    GRIDS,
    IMAGE,
    MERGE,
    MROPE,
    ONE_FRAME,
    PATCH,
    START,
    TYPED,
    UNROLLED,
    VIDEO,
    VIDEO_END,
    VIDEO_START,
    VISION_IDS,
    in_frames,
    pictures,
    tower,
    typed,
)

WINDOW = 12
# The names that towers of the SigLIP kind give to the same settings.
SIGLIP = {
    "hidden_size": 48,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "patch_size": PATCH,
}
KEPT = (12, 7)  # tokens of the first and second frame of a video that compression keeps


def _video_llama_3(text: dict[str, Any]) -> nn.Module:
    config = VideoLlama3Config(
        text_config={"model_type": "qwen2"} | text, vision_config=SIGLIP, image_token_id=IMAGE, video_token_id=VIDEO
    )
    return VideoLlama3ForConditionalGeneration(config)


def _merged(letter: str, generator: torch.Generator) -> Picture:
    t, h, w = GRIDS[letter]
    pixels = torch.randn(t * h * w, *ONE_FRAME, generator=generator)
    merge = 1 if letter == "C" else MERGE
    tensors = (pixels, torch.tensor([GRIDS[letter]]), torch.tensor([merge]))
    if letter != "V":
        ids = [IMAGE] * (h * w // merge**2)
        return ids, dict(zip(("pixel_values", "image_grid_thw", "image_merge_sizes"), tensors, strict=True))
    video = dict(zip(("pixel_values_videos", "video_grid_thw", "video_merge_sizes"), tensors, strict=True))
    frame = h * w // merge**2
    video["video_compression_mask"] = torch.cat([torch.arange(frame) < kept for kept in KEPT])
    return [i for time, kept in enumerate(KEPT) for i in (TEXT[0] + time, *[VIDEO] * kept)], video


def _paddleocr_vl(text: dict[str, Any]) -> nn.Module:
    settings = {"head_dim": 16, "rope_parameters": MROPE, "tie_word_embeddings": False} | text
    vision = SIGLIP | {"image_size": 6 * PATCH}
    config = PaddleOCRVLConfig(text_config=settings, vision_config=vision, tie_word_embeddings=False, **VISION_IDS)
    return PaddleOCRVLForConditionalGeneration(config)


def _ernie4_5_vl_moe(text: dict[str, Any]) -> nn.Module:
    settings = {
        "moe_intermediate_size": [32, 24],
        "moe_num_experts": 4,
        "moe_k": 2,
        "moe_num_shared_experts": 1,
        "rope_parameters": MROPE | {"mrope_section": [3, 3, 2]},
        "tie_word_embeddings": False,
    } | text
    config = Ernie4_5_VLMoeConfig(
        text_config=settings,
        vision_config=tower(),
        image_start_token_id=START,
        image_end_token_id=END,
        image_token_id=IMAGE,
        video_start_token_id=VIDEO_START,
        video_end_token_id=VIDEO_END,
        video_token_id=VIDEO,
        tie_word_embeddings=False,
    )
    return Ernie4_5_VLMoeForConditionalGeneration(config)


def _in_pairs(grid: tuple[int, int, int]) -> list[int]:
    t, h, w = grid
    return [VIDEO_START, *[VIDEO] * (t // 2 * h * w // MERGE**2), VIDEO_END]


def _doubly_typed(inputs: Inputs) -> Inputs:
    inputs = typed(inputs)
    ids = inputs["input_ids"]
    marks = torch.isin(ids, torch.tensor([START, END])) + 2 * torch.isin(ids, torch.tensor([VIDEO_START, VIDEO_END]))
    return inputs | {"moe_mm_token_type_ids": inputs["mm_token_type_ids"] + marks}


def _kimi_k25(text: dict[str, Any]) -> nn.Module:
    settings = {
        "model_type": "deepseek_v3",
        "q_lora_rank": 24,
        "kv_lora_rank": 16,
        "qk_rope_head_dim": 8,
        "qk_nope_head_dim": 8,
        "v_head_dim": 16,
        "moe_intermediate_size": 32,
        "n_routed_experts": 4,
        "num_experts_per_tok": 2,
        "n_group": 1,
        "topk_group": 1,
        "first_k_dense_replace": 1,
    } | text
    settings["num_key_value_heads"] = settings["num_attention_heads"]
    config = Kimi_K25Config(
        text_config=settings,
        vision_config=SIGLIP | {"pos_emb_height": 6, "pos_emb_width": 6},
        projection_hidden_size=SIGLIP["hidden_size"],
        tie_word_embeddings=False,
        **VISION_IDS,
    )
    return Kimi_K25ForConditionalGeneration(config)


def _pooled(letter: str, generator: torch.Generator) -> Picture:
    ids, tensors = pictures(values=UNROLLED)(letter, generator)
    if letter != "V":
        return ids, tensors
    _, h, w = GRIDS[letter]
    ids = [TEXT[0], START, *[VIDEO] * (h * w // MERGE**2), END]
    return ids, {"pixel_values_videos": tensors["pixel_values"][: h * w], "video_grid_thw": torch.tensor([[1, h, w]])}


def _cosmos3_edge(text: dict[str, Any]) -> nn.Module:
    settings = {"head_dim": 16, "rope_parameters": MROPE} | text
    config = Cosmos3EdgeConfig(
        text_config=settings, vision_config=SIGLIP | {"num_patches": 36}, projector_hidden_size=96, **VISION_IDS
    )
    return Cosmos3EdgeForConditionalGeneration(config)


def _cohere_compass(text: dict[str, Any]) -> nn.Module:
    layers = range(text["num_hidden_layers"])
    settings = {
        "sliding_window": WINDOW,
        "layer_types": ["full_attention" if i % 2 else "sliding_attention" for i in layers],
        "rope_parameters": {
            "sliding_attention": MROPE | {"mrope_section": [3, 3, 2], "mrope_interleaved": True},
            "full_attention": None,
        },
        "logit_scale": 0.5,
        "tie_word_embeddings": False,
    } | text
    vision = tower(out_hidden_size=settings["hidden_size"], num_position_embeddings=36, deepstack_visual_indexes=[0, 1])
    config = CohereCompassConfig(text_config=settings, vision_config=vision, **VISION_IDS)
    return CohereCompassForConditionalGeneration(config)


BUILDS = (
    Build("video_llama_3", "video_llama_3", _video_llama_3, _merged, letters="ABCV", joined=by_name),
    Build("paddleocr_vl", "paddleocr_vl", _paddleocr_vl, pictures(values=UNROLLED), **TYPED),
    Build(
        "ernie4_5_vl_moe",
        "ernie4_5_vl_moe",
        _ernie4_5_vl_moe,
        pictures(_in_pairs, values=ONE_FRAME),
        letters="ABCV",
        joined=by_name,
        completed=_doubly_typed,
        per_token=("mm_token_type_ids", "moe_mm_token_type_ids"),
    ),
    Build("kimi_k25", "kimi_k25", _kimi_k25, _pooled, letters="ABCV", joined=by_name),
    Build(
        "cosmos3_edge",
        "cosmos3_edge",
        _cosmos3_edge,
        pictures(in_frames, values=ONE_FRAME),
        letters="ABCV",
        **TYPED,
    ),
    Build("cohere_compass", "cohere_compass", _cohere_compass, pictures(in_frames), letters="ABCV", **TYPED),
)
