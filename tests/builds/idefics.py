"""The Idefics family. Pixels are (rows, pictures, 3, height, width), and pictures of zeros are dropped by the model.

- idefics3: tiles in rows and columns, each under its own mark, then the whole picture; a pixel shuffle makes 2 × 2
  patches one token. Features are (tiles, tokens, width) in older releases and a list with one entry a row in newer.
- smolvlm: the same, with its own merger; a video is a picture for each frame.
- idefics2: pictures keep their aspect ratio, masks say which pixels are real, and a perceiver makes each a fixed number
  of tokens. The language model is Mistral, whose layers all have a sliding window.
- idefics: pictures enter by gated cross attention between the layers; each token sees the last picture before it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn
from transformers import (
    Idefics2Config,
    Idefics2ForConditionalGeneration,
    Idefics3Config,
    Idefics3ForConditionalGeneration,
    IdeficsConfig,
    IdeficsForVisionText2Text,
    LlamaConfig,
    MistralConfig,
    SmolVLMConfig,
    SmolVLMForConditionalGeneration,
)

from builds.build import TEXT, VOCABULARY, Build, Inputs, Picture
from builds.joining import padded
from builds.towers import tower

NESTED = ("pixel_values", "pixel_attention_mask")
IMAGE, FAKE, GLOBAL, NEWLINE, CELLS = 250, 251, 252, 253, 240
SIDE, PATCH, TOKENS = 24, 4, 9  # a tile of 6 × 6 patches is 3 × 3 tokens
TILES = {"A": (1, 2), "B": (0, 0), "C": (2, 2)}  # rows and columns of tiles; none where the picture is not split
FRAMES = 3
LATENTS = 16
SIZES = {"A": (16, 24), "B": (24, 12), "C": (24, 24)}


class Nested(Build):
    """A class whose pixels lie in rows as the ids do: (rows, pictures of a row, 3, height, width), with pictures of
    zeros where a row of a batch has fewer than another. A text-only row alone has no pixels."""

    def sample(self, row: str, **options: Any) -> Inputs:
        inputs = super().sample(row, **options)
        return {name: value[None] if name in NESTED else value for name, value in inputs.items()}

    def collate(self, parts: Sequence[Inputs], **options: Any) -> Inputs:
        filled = list(parts)
        for part in parts:
            if "pixel_values" in part:
                empty = {name: torch.zeros_like(part[name][:, :1]) for name in NESTED if name in part}
                filled = [empty | each for each in parts]
                break
        return super().collate(filled, **options)


def _tiled(text: dict[str, Any]) -> dict[str, Any]:
    vision = tower(SIDE, PATCH)
    return {"text_config": LlamaConfig(**text), "vision_config": vision, "image_token_id": IMAGE, "scale_factor": 2}


def _idefics3(text: dict[str, Any]) -> nn.Module:
    return Idefics3ForConditionalGeneration(Idefics3Config(**_tiled(text)))


def _smolvlm(text: dict[str, Any]) -> nn.Module:
    return SmolVLMForConditionalGeneration(SmolVLMConfig(**_tiled(text)))


def _tiles(letter: str, generator: torch.Generator) -> Picture:
    whole = [FAKE, GLOBAL, *[IMAGE] * TOKENS, FAKE]
    if letter == "V":
        ids = [i for f in range(FRAMES) for i in (TEXT[0] + f, *whole)]
        count = FRAMES
    else:
        rows, columns = TILES[letter]
        ids = []
        for row in range(rows):
            ids += [i for c in range(columns) for i in (FAKE, CELLS + columns * row + c, *[IMAGE] * TOKENS)] + [NEWLINE]
        ids += [NEWLINE, *whole] if rows else whole
        count = rows * columns + 1
    pixels = torch.randn(count, 3, SIDE, SIDE, generator=generator)
    return ids, {"pixel_values": pixels, "pixel_attention_mask": torch.ones(count, SIDE, SIDE, dtype=torch.int64)}


def _idefics2(text: dict[str, Any]) -> nn.Module:
    config = Idefics2Config(
        text_config=MistralConfig(**{"sliding_window": 12} | text),
        vision_config=tower(SIDE, PATCH),
        perceiver_config={
            "hidden_size": text["hidden_size"],
            "resampler_n_latents": LATENTS,
            "resampler_depth": 2,
            "resampler_n_heads": 4,
            "resampler_head_dim": 16,
            "num_key_value_heads": 2,
        },
        image_token_id=IMAGE,
    )
    return Idefics2ForConditionalGeneration(config)


def _of_any_shape(letter: str, generator: torch.Generator) -> Picture:
    height, width = SIZES[letter]
    pixels = torch.randn(1, 3, height, width, generator=generator)
    mask = torch.ones(1, height, width, dtype=torch.int64)
    return [FAKE, *[IMAGE] * LATENTS, FAKE], {"pixel_values": pixels, "pixel_attention_mask": mask}


def _idefics(text: dict[str, Any]) -> nn.Module:
    known = {name: value for name, value in text.items() if name != "num_key_value_heads"}
    config = IdeficsConfig(
        **known | {"vocab_size": VOCABULARY - 6, "additional_vocab_size": 6, "cross_layer_interval": 2},
        use_resampler=True,
        qk_layer_norms=True,
        vision_config={name: value for name, value in tower(SIDE, PATCH).items() if name != "hidden_size"}
        | {"embed_dim": 48},
        perceiver_config={
            "use_resampler": True,
            "resampler_n_latents": LATENTS,
            "resampler_depth": 2,
            "resampler_n_heads": 4,
            "resampler_head_dim": 12,
        },
    )
    return IdeficsForVisionText2Text(config)


def _crossed(letter: str, generator: torch.Generator) -> Picture:
    return [FAKE, IMAGE, FAKE], {"pixel_values": torch.randn(1, 3, SIDE, SIDE, generator=generator)}


class Crossed(Build):
    """Idefics: a row always has pixels, and `image_attention_mask`, (rows, tokens, pictures), says who sees what."""

    def model(self, **options: Any) -> nn.Module:
        made: Any = super().model(**options)
        made.lm_head.additional_fc.weight.data.zero_()  # the special tokens are a vocabulary of their own
        return made

    def sample(self, row: str, *, dtype: torch.dtype = torch.float32, **options: Any) -> Inputs:
        inputs = super().sample(row, dtype=dtype, **options)
        pixels = inputs.get("pixel_values", torch.zeros(1, 3, SIDE, SIDE, dtype=dtype))
        last = (inputs["input_ids"] == IMAGE).cumsum(1) - 1
        seen = last[..., None] == torch.arange(pixels.shape[0])
        return inputs | {"pixel_values": pixels[None], "image_attention_mask": seen}

    def collate(self, parts: Sequence[Inputs], *, side: str | None = None, extra: int = 0) -> Inputs:
        batch = super().collate(
            [{name: value for name, value in part.items() if name != "image_attention_mask"} for part in parts],
            side=side,
            extra=extra,
        )
        masks = []
        for part in parts:
            gap = batch["input_ids"].shape[1] - part["input_ids"].shape[1]
            pad = (gap, 0) if (side or self.padding) == "left" else (0, gap)
            masks.append({"image_attention_mask": nn.functional.pad(part["image_attention_mask"], (0, 0, *pad))})
        return batch | padded(masks)


BUILDS = (
    Nested("idefics3", "idefics3", _idefics3, _tiles, joined=padded),
    Nested("smolvlm", "smolvlm", _smolvlm, _tiles, letters="ABCV", joined=padded),
    Nested("idefics2", "idefics2", _idefics2, _of_any_shape, joined=padded),
    Crossed(
        "idefics",
        "idefics",
        _idefics,
        _crossed,
        joined=padded,
        cannot="Pictures enter by cross attention between the layers and have no tokens in the sequence.",
    ),
)
