"""BLIP-2 and its kin: a fixed number of queries reads each picture, and their outputs stand in the prompt.

The pictures' tokens come first, before the text. The language model is a whole model of its own (`language_model` with
its head): `generate` of the outer class scatters the features and then calls `generate` of the language model, with
`inputs_embeds`; the outer forward is not called. All of them need a picture: a row of text alone is refused.

InstructBLIP reads the question in its Q-Former too: one question for each picture, padded right by its own tokenizer.
InstructBLIPVideo takes videos of frames, each frame of which goes through the Q-Former on its own.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import transformers
from torch import nn

from builds.build import Build, Inputs, Picture, by_name
from builds.terms import in_terms

IMAGE = 250
SIDE, PATCH, QUERIES, FRAMES = 56, 14, 16, 4
_QUESTION = {"A": 5, "B": 7, "C": 4, "V": 5}  # tokens of the Q-Former's own vocabulary


def _opt(text: dict[str, Any]) -> transformers.OPTConfig:
    """OPT knows no groups of heads. Its head is untied here, since a tied one echoes the last token."""
    settings = in_terms(text, ffn_dim="intermediate_size", without=("num_key_value_heads",))
    return transformers.OPTConfig(**settings, word_embed_proj_dim=text["hidden_size"], tie_word_embeddings=False)


def _llama(text: dict[str, Any]) -> transformers.LlamaConfig:
    return transformers.LlamaConfig(**text)


def _make(family: str, language: Callable[[dict[str, Any]], Any]) -> Callable[[dict[str, Any]], nn.Module]:
    def make(text: dict[str, Any]) -> nn.Module:
        tower = {"hidden_size": 48, "intermediate_size": 96, "num_attention_heads": 4}
        placeholder = "video_token_index" if family.endswith("Video") else "image_token_index"
        config = getattr(transformers, f"{family}Config")(
            vision_config=tower | {"num_hidden_layers": 2, "image_size": SIDE, "patch_size": PATCH},
            qformer_config=tower | {"num_hidden_layers": 4, "vocab_size": 64, "max_position_embeddings": 32},
            text_config=language(text),
            num_query_tokens=QUERIES,
            **{placeholder: IMAGE},
        )
        model = getattr(transformers, f"{family}ForConditionalGeneration")(config)
        model.language_model.generation_config.eos_token_id = None  # it is the one whose `generate` runs
        return model

    return make


def _picture(letter: str, generator: torch.Generator) -> Picture:
    return [IMAGE] * QUERIES, {"pixel_values": torch.randn(1, 3, SIDE, SIDE, generator=generator)}


def _with_question(letter: str, generator: torch.Generator) -> Picture:
    ids, inputs = _picture(letter, generator)
    return ids, inputs | _question(letter, generator)


def _video(letter: str, generator: torch.Generator) -> Picture:
    pixels = torch.randn(1, FRAMES, 3, SIDE, SIDE, generator=generator)
    return [IMAGE] * QUERIES * FRAMES, {"pixel_values": pixels} | _question(letter, generator)


def _question(letter: str, generator: torch.Generator) -> Inputs:
    ids = torch.randint(1, 64, (1, _QUESTION[letter]), generator=generator)
    return {"qformer_input_ids": ids, "qformer_attention_mask": torch.ones_like(ids)}


def _joined(pictures: Sequence[Inputs]) -> Inputs:
    """Pictures and their questions, the questions padded right to the longest."""
    width = max((picture["qformer_input_ids"].shape[1] for picture in pictures), default=0)
    padded = [
        {k: nn.functional.pad(v, (0, width - v.shape[1])) if k.startswith("qformer") else v for k, v in picture.items()}
        for picture in pictures
    ]
    return by_name(padded)


BUILDS = (
    Build("blip_2", "blip-2", _make("Blip2", _opt), _picture),
    Build("instructblip", "instructblip", _make("InstructBlip", _llama), _with_question, joined=_joined),
    Build(
        "instructblipvideo",
        "instructblipvideo",
        _make("InstructBlipVideo", _llama),
        _video,
        letters="V",
        joined=_joined,
    ),
)
