"""The model of `lightcompress.py`, in words that transformers of 2024 and of today both understand."""

from __future__ import annotations

import torch
from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig

IMAGE, TEXT, START, SIDE = 500, 32, 8, 24
CONTENT, KEEP, LAYER = SIDE * SIDE, 64, 2


def config() -> LlavaConfig:
    """24 × 24 patches, an LM of 16 × 384, a tower of 24 × 64.

    LightCompress's VisionZip is written for towers of 24 blocks.
    """
    vision = CLIPVisionConfig(
        hidden_size=64, intermediate_size=256, num_hidden_layers=24, num_attention_heads=1, image_size=SIDE * 14,
        patch_size=14, projection_dim=64,
    )  # fmt: skip
    text = LlamaConfig(
        vocab_size=512, hidden_size=384, intermediate_size=1024, num_hidden_layers=16, num_attention_heads=6,
        num_key_value_heads=6, max_position_embeddings=4096, pad_token_id=0,
    )  # fmt: skip
    return LlavaConfig(vision_config=vision, text_config=text, image_token_index=IMAGE, image_seq_length=CONTENT)


def prompt(tokens: int) -> torch.Tensor:
    text = torch.arange(5, 5 + TEXT)[None]
    return torch.cat([text[:, :START], torch.full((1, tokens), IMAGE), text[:, START:]], 1)


def pixels() -> torch.Tensor:
    return torch.randn(1, 3, SIDE * 14, SIDE * 14, generator=torch.Generator().manual_seed(1))
