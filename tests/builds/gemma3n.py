"""Gemma 3n: four streams of hidden states, inputs for each layer beside the embeddings, keys and values of the last
layers taken from layers before, sparse activations, windows.

A token of a picture or a sound has an id of a vocabulary of its own above that of text. The language model is given
the embeddings and `per_layer_inputs` (rows × tokens × layers × width). Layers are given and give hidden states of
streams × rows × tokens × hidden. Features are a tensor (pictures × tokens × hidden). Masks are made inside the
language model, as a dict of 4-D masks.

The class's tower is MobileNet V5 of the package timm, which the tests do not need otherwise; two convolutions stand in
for it, with an output of the same kind (pictures × channels × rows × columns).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers import (
    AutoModel,
    Gemma3nAudioConfig,
    Gemma3nConfig,
    Gemma3nForConditionalGeneration,
    Gemma3nTextConfig,
    Gemma3nVisionConfig,
    PreTrainedModel,
)
from transformers.modeling_outputs import BaseModelOutputWithPooling

from builds.build import Build, Inputs, Picture, by_name

START, SOUND_START = 240, 241
OWN = 4  # ids of a vocabulary of pictures or sounds
END, IMAGE, SOUND_END, SOUND = 248, 249, 252, 253  # the first two of either vocabulary
SIDE, TOKENS = 32, 16
MEL, LENGTH, SOUNDS = 16, 64, 6  # the encoder folds 64 frames to 4 tokens; the class fills up to 6


class _TowerConfig(Gemma3nVisionConfig):
    model_type = "gemma3n_stand_in"


class _Tower(PreTrainedModel):
    config_class = _TowerConfig
    main_input_name = "pixel_values"

    def __init__(self, config: Gemma3nVisionConfig) -> None:
        super().__init__(config)
        self.patches = nn.Conv2d(3, config.hidden_size, 8, 8)
        self.mixer = nn.Conv2d(config.hidden_size, config.hidden_size, 3, padding=1)
        self.post_init()

    def forward(self, pixel_values: Tensor, **_: Any) -> BaseModelOutputWithPooling:
        return BaseModelOutputWithPooling(last_hidden_state=self.mixer(self.patches(pixel_values).relu()))


AutoModel.register(_TowerConfig, _Tower)


def _gemma3n(text: dict[str, Any]) -> nn.Module:
    layers = text["num_hidden_layers"]
    settings = {
        "head_dim": 16,
        "sliding_window": 12,
        "layer_types": ["full_attention" if i % 2 else "sliding_attention" for i in range(layers)],
        "vocab_size_per_layer_input": END,
        "hidden_size_per_layer_input": 16,
        "num_kv_shared_layers": max(0, min(2, layers - 2)),
        "laurel_rank": 8,
        "activation_sparsity_pattern": [0.5 if i < layers // 2 else 0.0 for i in range(layers)],
        "tie_word_embeddings": False,
    }
    config = Gemma3nConfig(
        text_config=Gemma3nTextConfig(**settings | text),
        vision_config=_TowerConfig(hidden_size=48, vocab_size=OWN, vocab_offset=END),
        audio_config=Gemma3nAudioConfig(
            vocab_size=OWN,
            vocab_offset=SOUND_END,
            input_feat_size=MEL,
            hidden_size=32,
            conf_num_attention_heads=4,
            conf_num_hidden_layers=2,
            sscp_conv_channel_size=(8, 4),
        ),
        audio_soft_tokens_per_image=SOUNDS,
        vision_soft_tokens_per_image=TOKENS,
        boi_token_id=START,
        eoi_token_id=END,
        image_token_id=IMAGE,
        boa_token_id=SOUND_START,
        eoa_token_id=SOUND_END,
        audio_token_id=SOUND,
        tie_word_embeddings=False,
    )
    return Gemma3nForConditionalGeneration(config)


def _picture(letter: str, generator: torch.Generator) -> Picture:
    if letter == "U":
        sound = torch.randn(1, LENGTH, MEL, generator=generator)
        ids = [SOUND_START, *[SOUND] * SOUNDS, SOUND_END]
        return ids, {"input_features": sound, "input_features_mask": torch.ones(1, LENGTH, dtype=torch.bool)}
    pixels = torch.rand(1, 3, SIDE, SIDE, generator=generator)
    return [START, *[IMAGE] * TOKENS, END], {"pixel_values": pixels}


def _completed(inputs: Inputs) -> Inputs:
    ids = inputs["input_ids"]
    return inputs | {"token_type_ids": (ids == IMAGE) + 3 * (ids == SOUND)}


BUILDS = (Build("gemma3n", "gemma3n", _gemma3n, _picture, "ABCU", by_name, _completed, ("token_type_ids",)),)
