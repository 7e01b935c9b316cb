"""Chameleon and Emu3: a VQ model turns a picture into codes, and their rows of the embedding table stand in the text.

The features are rows of `embed_tokens`, so equal codes have equal features. Both keep a map between names of the
vocabulary and ids in their configuration, from which also the id of the placeholder comes.

Chameleon has no language model inside: the base model is the decoder itself, with a VQ model beside its layers, in one
of two forms: norms before the parts of a layer, or after them (`swin_norm`, as the 30B). All pictures are square. Its
head never says a code.

Emu3 has pictures of any size, padded to the largest of a batch and cut after the VQ model, which sees the padding: a
picture's codes depend on its neighbours in the batch. Here all are padded to one size from the start, so that a batch
equals its rows. Each row of codes ends with a token of its own: h × w codes stand for h · (w + 1) placeholders.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import nn
from transformers import (
    ChameleonConfig,
    ChameleonForConditionalGeneration,
    Emu3Config,
    Emu3ForConditionalGeneration,
    Emu3TextConfig,
)

from builds.build import Build, Picture

START, MARK, LINE, FILE_END, END, IMAGE = 200, 201, 202, 203, 204, 250
CODES = range(205, 245)  # ids of the visual vocabulary
FACTOR = 4  # pixels of a code's side
SIDE = 20  # of Chameleon's pictures: 5 × 5 codes
_SIZES = {"A": (5, 4), "B": (3, 7), "C": (4, 4)}  # codes of Emu3's pictures, height and width
_CANVAS = (5, 7)  # the smallest that holds them all


def _chameleon(text: dict[str, Any], *, swin_norm: bool) -> nn.Module:
    letters = ["".join(chr(ord("A") + int(digit)) for digit in str(code)) for code in range(len(CODES))]
    config = ChameleonConfig(
        vq_config={
            "embed_dim": 32,
            "latent_channels": 32,
            "num_embeddings": len(CODES),
            "resolution": SIDE,
            "base_channels": 32,
            "channel_multiplier": [1, 1, 2],
            "num_res_blocks": 1,
        },
        vocabulary_map={"<image>": IMAGE} | {f"IMGIMG{name}Z": i for name, i in zip(letters, CODES, strict=True)},
        swin_norm=swin_norm,
        **text,
    )
    return ChameleonForConditionalGeneration(config)


def _chameleon_picture(letter: str, generator: torch.Generator) -> Picture:
    pixels = torch.randn(1, 3, SIDE, SIDE, generator=generator)
    return [START, *[IMAGE] * (SIDE // FACTOR) ** 2, END], {"pixel_values": pixels}


def _emu3(text: dict[str, Any]) -> nn.Module:
    names = {f"<|visual token {code:06d}|>": i for code, i in enumerate(CODES)}
    config = Emu3Config(
        vq_config={
            "codebook_size": len(CODES),
            "latent_channels": 32,
            "temporal_downsample_factor": 2,
            "base_channels": 32,
            "channel_multiplier": [1, 1, 2],
            "num_res_blocks": 1,
            "attn_resolutions": [2],
            "hidden_size": 64,
        },
        text_config=Emu3TextConfig(**text),
        vocabulary_map={"<image>": IMAGE, "<|extra_200|>": LINE} | names,
    )
    return Emu3ForConditionalGeneration(config)


def _emu3_picture(letter: str, generator: torch.Generator) -> Picture:
    height, width = _SIZES[letter]
    pixels = torch.zeros(1, 3, *(FACTOR * side for side in _CANVAS))
    pixels[..., : height * FACTOR, : width * FACTOR].normal_(generator=generator)
    ids = [START, 10 + height, 20, 10 + width, MARK, *[IMAGE] * (height * (width + 1)), FILE_END, END]
    return ids, {"pixel_values": pixels, "image_sizes": torch.tensor([[height * FACTOR, width * FACTOR]])}


BUILDS = (
    Build("chameleon", "chameleon", partial(_chameleon, swin_norm=False), _chameleon_picture),
    Build("chameleon_swin", "chameleon", partial(_chameleon, swin_norm=True), _chameleon_picture),
    Build("emu3", "emu3", _emu3, _emu3_picture),
)
