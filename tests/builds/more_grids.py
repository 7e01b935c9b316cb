"""More classes that take pictures as grids of flat patches, of which 2 × 2 become one token.

hyperclovax_vision_v2: a Qwen2.5-VL tower before a language model with post-norms and scaled residuals; plain positions.
hunyuan_vl: each row of a picture's tokens ends with a learned one and the picture has one before and one after it, all
of them placeholders; positions have four axes: place in the text, width, height, number of the picture. As pictures are
numbered through a whole batch, a row of a batch is not what it is alone. Features are one tensor (1 × tokens of all
pictures × hidden).
muse_glimmer: windows with rotary positions and full layers without; placeholders are embedded as token 0.
minimax_m3_vl: sparse layers, in which a query sees the few blocks of keys that an indexer scores highest; experts.
Blocks are cut by places in the padded row, so that batches are padded on the right.
Features of the others are a tuple with one tensor (tokens × hidden) for each picture. Masks are made inside the
language model.
"""

from __future__ import annotations

from typing import Any

import torch
import transformers
from packaging.version import Version
from torch import nn
from transformers import (
    HunYuanVLConfig,
    HunYuanVLForConditionalGeneration,
    HyperCLOVAXVisionV2Config,
    HyperCLOVAXVisionV2ForConditionalGeneration,
    MiniMaxM3SparseForConditionalGeneration,
    MiniMaxM3VLConfig,
    MuseGlimmerConfig,
    MuseGlimmerForConditionalGeneration,
)

from builds.build import TEXT, Build, Picture, by_name
from builds.grids import (
    END,
    GRIDS,
    IMAGE,
    MARK,
    MERGE,
    ONE_FRAME,
    PATCH,
    START,
    TYPED,
    VIDEO,
    VIDEO_END,
    VIDEO_START,
    in_frames,
    in_run,
    pictures,
    tower,
)

TOWER = {"hidden_size": 48, "intermediate_size": 96, "num_hidden_layers": 3, "num_attention_heads": 4}

# The tower of older versions lets all pictures of a batch see each other.
MINIMAX_PADDING = "right" if Version(transformers.__version__) >= Version("5.24") else None


def _hyperclovax(text: dict[str, Any]) -> nn.Module:
    scales = {"embedding_multiplier": 2.0, "residual_multiplier": 0.5, "attention_multiplier": 0.2}
    sizes = {"out_hidden_size": 32, "window_size": 4 * PATCH, "fullatt_block_indexes": [1]}
    config = HyperCLOVAXVisionV2Config(
        text_config=scales | text | {"model_type": "hyperclovax"},
        vision_config=tower(**sizes),
        image_token_id=IMAGE,
        video_token_id=VIDEO,
        tie_word_embeddings=False,
    )
    return HyperCLOVAXVisionV2ForConditionalGeneration(config)


def _hunyuan(text: dict[str, Any]) -> nn.Module:
    rope = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [2, 2, 2, 2]}
    config = HunYuanVLConfig(
        text_config={"head_dim": 16, "rope_parameters": rope, "tie_word_embeddings": False} | text,
        vision_config=TOWER | {"patch_size": PATCH, "max_image_size": 8 * PATCH},
        image_token_id=IMAGE,
        im_start_id=START,
        im_end_id=END,
        tie_word_embeddings=False,
    )
    return HunYuanVLForConditionalGeneration(config)


def _muse_glimmer(text: dict[str, Any]) -> nn.Module:
    layers = text["num_hidden_layers"]
    full = [(layers - 1 - i) % 2 == 0 for i in range(layers)]
    settings = {
        "head_dim": 16,
        "sliding_window": 12,
        "layer_types": ["full_attention" if is_full else "sliding_attention" for is_full in full],
        "layer_rope_theta": [0 if is_full else 10000.0 for is_full in full],
        "output_multiplier": 1.0,
    }
    config = MuseGlimmerConfig(
        text_config=settings | text,
        vision_config=TOWER
        | {
            "patch_size": PATCH,
            "pos_emb_height": 8,
            "pos_emb_width": 8,
            "max_position_embeddings": 64,
            "layer_types": ["window_attention", "full_attention", "full_attention"],
        },
        image_token_id=IMAGE,
        video_token_id=VIDEO,
        out_hidden_size=48 * MERGE**2,
        projector_hidden_size=64,
    )
    return MuseGlimmerForConditionalGeneration(config)


def _minimax(text: dict[str, Any]) -> nn.Module:
    layers = text["num_hidden_layers"]
    settings = {
        "head_dim": 16,
        "rotary_dim": 8,
        "dense_intermediate_size": 128,
        "shared_intermediate_size": 32,
        "intermediate_size": 32,
        "num_local_experts": 4,
        "num_experts_per_tok": 2,
        "layer_types": ["minimax_m3_sparse" if i % 2 else "full_attention" for i in range(layers)],
        "mlp_layer_types": ["sparse" if i % 2 else "dense" for i in range(layers)],
        "index_n_heads": 2,
        "index_head_dim": 16,
        "index_block_size": 4,
        "index_topk_blocks": 3,
    }
    config = MiniMaxM3VLConfig(
        text_config=text | settings,
        vision_config=TOWER | {"patch_size": PATCH, "num_attention_heads": 2},
        image_token_index=IMAGE,
        video_token_index=VIDEO,
        projector_hidden_size=64,
    )
    return MiniMaxM3SparseForConditionalGeneration(config)


def _bare(letter: str, generator: torch.Generator) -> Picture:
    ids, tensors = pictures(in_run)(letter, generator)
    return ids[1:-1], tensors


def _with_row_ends(letter: str, generator: torch.Generator) -> Picture:
    _, tensors = pictures(values=ONE_FRAME)(letter, generator)
    _, rows, columns = GRIDS[letter]
    return [START, *[IMAGE] * (2 + rows // MERGE * (columns // MERGE + 1)), END], tensors


def _in_parts(grid: tuple[int, int, int]) -> list[int]:
    """A video as one run for each frame after the text of its time, with marks between the frames."""
    t, h, w = grid
    frames = [i for frame in range(t) for i in (TEXT[0] + frame, *[VIDEO] * (h * w // MERGE**2), MARK)]
    return [VIDEO_START, *frames[:-1], VIDEO_END]


BUILDS = (
    Build("hyperclovax_vision_v2", "hyperclovax_vision_v2", _hyperclovax, _bare, "ABCV", by_name),
    Build("hunyuan_vl", "hunyuan_vl", _hunyuan, _with_row_ends, padding=None, **TYPED),
    Build("muse_glimmer", "muse_glimmer", _muse_glimmer, pictures(_in_parts), "ABCV", by_name),
    Build("minimax_m3_vl", "minimax_m3_vl", _minimax, pictures(in_frames), "ABCV", by_name, padding=MINIMAX_PADDING),
)
