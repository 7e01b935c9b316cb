"""Qwen2-Audio: sounds of three lengths, each padded to the window of a Whisper encoder that is pooled by 2.

The letters are sounds: A, B and C last for 23, 57 and 8 mel frames of the 64 that the encoder takes.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from transformers import Qwen2AudioConfig, Qwen2AudioForConditionalGeneration

from builds.build import Build, Picture, by_name
from builds.grids import AUDIO_END, AUDIO_START
from builds.grids import IMAGE as AUDIO  # the placeholder that references by hand look for

MELS, WINDOW = 16, 64
FRAMES = {"A": 23, "B": 57, "C": 8}
EAR = {"num_mel_bins": MELS, "d_model": 48, "encoder_layers": 2, "encoder_attention_heads": 4, "encoder_ffn_dim": 96}


def _qwen2_audio(text: dict[str, Any]) -> nn.Module:
    config = Qwen2AudioConfig(
        text_config={"model_type": "qwen2"} | text,
        audio_config={"model_type": "qwen2_audio_encoder", "max_source_positions": WINDOW // 2} | EAR,
        audio_token_index=AUDIO,
    )
    return Qwen2AudioForConditionalGeneration(config)


def tokens(frames: int) -> int:
    """Tokens of a sound of so many mel frames: a convolution of stride 2, and pooling by 2."""
    return ((frames - 1) // 2 - 1) // 2 + 1


def _sound(letter: str, generator: torch.Generator) -> Picture:
    frames = FRAMES[letter]
    mask = (torch.arange(WINDOW) < frames).long()[None]
    mels = torch.randn(1, MELS, WINDOW, generator=generator) * mask[:, None]
    ids = [AUDIO_START, *[AUDIO] * tokens(frames), AUDIO_END]
    return ids, {"input_features": mels, "feature_attention_mask": mask}


SOUNDS = {"qwen2_audio": Build("qwen2_audio", "qwen2_audio", _qwen2_audio, _sound, joined=by_name)}
BUILDS = tuple(SOUNDS.values())
