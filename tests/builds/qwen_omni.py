"""Qwen-Omni thinkers: pictures, videos and sounds in one sequence. M-RoPE positions are read from the ids themselves,
so there are no token types; a video comes with the seconds of its temporal patches.

In older releases (5.19) the class has no base model: encoders and language model (`model`) hang on the class that
generates, and `get_image_features` with them. Features of pictures are one (tokens, hidden) tensor each; those of all
sounds are one tensor. Masks are made inside the language model.
- qwen2_5_omni_thinker: windows in the vision encoder; here the upper half of the layers has sliding windows.
- qwen3_omni_moe_thinker: experts and deepstack, as Qwen3-VL has them.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from transformers import (
    Qwen2_5OmniThinkerConfig,
    Qwen2_5OmniThinkerForConditionalGeneration,
    Qwen3OmniMoeThinkerConfig,
    Qwen3OmniMoeThinkerForConditionalGeneration,
)

from builds.build import Build, Picture, by_name
from builds.grids import (
    AUDIO,
    AUDIO_END,
    AUDIO_START,
    IMAGE,
    MARK,
    MROPE,
    PATCH,
    START,
    VIDEO,
    in_run,
    pictures,
    tower,
)
from builds.qwen import EXPERTS, INTERLEAVED, WINDOW

MELS, SOUND = 16, 120  # frames of the sound: more than one window of the encoders
SECONDS = 1.0
EAR = {"num_mel_bins": MELS, "d_model": 48, "encoder_layers": 2, "encoder_attention_heads": 4, "encoder_ffn_dim": 96}
IDS = {"audio_start_token_id": AUDIO_START, "user_token_id": MARK, "vision_start_token_id": START}


def _qwen2_5_omni(text: dict[str, Any]) -> nn.Module:
    settings = {"use_sliding_window": True, "sliding_window": WINDOW} | text
    settings.setdefault("max_window_layers", settings["num_hidden_layers"] // 2)
    return _thinker(settings, 20)


def _thinker(settings: dict[str, Any], stretch: int) -> nn.Module:
    """Of settings of its language model, and the frames to which the encoder of sounds attends at once."""
    settings, width = {"rope_parameters": MROPE} | settings, settings["hidden_size"]
    config = Qwen2_5OmniThinkerConfig(
        text_config=settings,
        vision_config=tower(depth=4, out_hidden_size=width, window_size=4 * PATCH, fullatt_block_indexes=[1, 3]),
        audio_config=EAR | {"n_window": stretch, "output_dim": width},
        image_token_index=IMAGE,
        video_token_index=VIDEO,
        audio_token_index=AUDIO,
        audio_end_token_id=AUDIO_END,
        **IDS,
    )
    return Qwen2_5OmniThinkerForConditionalGeneration(config)


def _qwen3_omni(text: dict[str, Any]) -> nn.Module:
    settings = {"head_dim": 16, "rope_parameters": INTERLEAVED} | EXPERTS | text
    width = settings["hidden_size"]
    config = Qwen3OmniMoeThinkerConfig(
        text_config=settings,
        vision_config=tower(out_hidden_size=width, num_position_embeddings=36, deepstack_visual_indexes=[0, 1]),
        audio_config=EAR | {"downsample_hidden_size": 8, "output_dim": width, "n_window_infer": 100},
        image_token_id=IMAGE,
        video_token_id=VIDEO,
        audio_token_id=AUDIO,
        **IDS,
    )
    return Qwen3OmniMoeThinkerForConditionalGeneration(config)


def _items(tokens_of_sound: int) -> Any:
    seen = pictures(in_run)

    def item(letter: str, generator: torch.Generator) -> Picture:
        if letter == "U":
            sound = torch.randn(1, MELS, SOUND, generator=generator)
            ids = [AUDIO_START, *[AUDIO] * tokens_of_sound, AUDIO_END]
            return ids, {"input_features": sound, "feature_attention_mask": torch.ones(1, SOUND, dtype=torch.int64)}
        ids, tensors = seen(letter, generator)
        if letter == "V":
            tensors["video_second_per_grid"] = torch.tensor([SECONDS])
        return ids, tensors

    return item


BUILDS = (
    Build(
        "qwen2_5_omni_thinker",
        "qwen2_5_omni_thinker",
        _qwen2_5_omni,
        _items(SOUND // 4),
        letters="ABCVU",
        joined=by_name,
    ),
    Build(
        "qwen3_omni_moe_thinker",
        "qwen3_omni_moe_thinker",
        _qwen3_omni,
        _items(16),  # 13 for a window of 100 frames, and 3 for the rest
        letters="ABCVU",
        joined=by_name,
    ),
)

# Classes that show the sound beside a video: the one above, and the same with full attention and short stretches.
HEARS = {
    "qwen2_5_omni_thinker": BUILDS[0],
    "qwen2_5_omni_full": Build(
        "qwen2_5_omni_full",
        "qwen2_5_omni_thinker",
        lambda settings: _thinker(settings, 7),
        _items(SOUND // 4),
        letters="ABCVU",
        joined=by_name,
    ),
}
