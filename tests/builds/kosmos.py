"""Kosmos-2 and 2.5: latent queries read a picture, and a mask over the prompt says where their outputs go.

The mask (`image_embeds_position_mask`) is a per-token input; no id in the configuration marks a placeholder. The
language model (`text_model`, with its head) gets ids, features and mask and scatters the features itself, scales them
with the embeddings of the words and counts positions from the ids, past the padding: called with `inputs_embeds` it
would count the padding too. The features are a tensor of pictures × queries.

Kosmos-2: the placeholders of a picture are different ids, one after the other; a row of text alone is refused; masks
are made by hand, causal and padding added. The outer `generate` calls that of the language model. In older releases the
queries' attention is causal with SDPA and not with eager attention, so that the two give different features.

Kosmos-2.5: patches of a picture come with their row and column in their first two channels, padded with zeros; a second
table of embeddings tells tokens of pictures (and their markers, −1 in the mask) from words.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import transformers
from torch import nn

from builds.build import Build, Inputs, Picture
from builds.terms import in_terms

START, END, FIRST = 200, 201, 210
QUERIES = 16
PLACEHOLDERS = range(FIRST, FIRST + QUERIES)
SIDE, PATCH = 56, 14
CELL, CELLS = 4, 40  # pixels of a patch's side and patches with padding, of Kosmos-2.5
_GRIDS = {"A": (5, 6), "B": (3, 9), "C": (4, 4)}  # patches of Kosmos-2.5, height and width


def _make(family: str, vision: dict[str, Any]) -> Callable[[dict[str, Any]], nn.Module]:
    def make(text: dict[str, Any]) -> nn.Module:
        settings = in_terms(
            text,
            embed_dim="hidden_size",
            ffn_dim="intermediate_size",
            layers="num_hidden_layers",
            attention_heads="num_attention_heads",
            without=("num_key_value_heads",),
        )
        tower = {"hidden_size": 48, "intermediate_size": 96, "num_hidden_layers": 3, "num_attention_heads": 4}
        config = getattr(transformers, f"{family}Config")(
            text_config=settings | {"tie_word_embeddings": False},  # a tied head echoes the last token
            vision_config=tower | vision,
            latent_query_num=QUERIES,
            tie_word_embeddings=False,
        )
        model = getattr(transformers, f"{family}ForConditionalGeneration")(config)
        model.text_model.generation_config.eos_token_id = None  # Kosmos-2 generates with the language model's own
        return model

    return make


def _kosmos2(letter: str, generator: torch.Generator) -> Picture:
    pixels = torch.randn(1, 3, SIDE, SIDE, generator=generator)
    return [START, *PLACEHOLDERS, END], {"pixel_values": pixels}


def _kosmos2_5(letter: str, generator: torch.Generator) -> Picture:
    height, width = _GRIDS[letter]
    patches = torch.zeros(1, CELLS, 2 + 3 * CELL**2)
    places = torch.cartesian_prod(torch.arange(1, height + 1), torch.arange(1, width + 1))
    patches[0, : height * width, :2] = places.float()
    patches[0, : height * width, 2:].normal_(generator=generator)
    sizes = {"height": torch.tensor([height * CELL]), "width": torch.tensor([width * CELL])}
    return [START, *[FIRST] * QUERIES, END], {"flattened_patches": patches} | sizes


def _placed(inputs: Inputs) -> Inputs:
    ids = inputs["input_ids"]
    mask = (ids >= FIRST).long()
    return inputs | {"image_embeds_position_mask": mask}


def _placed_and_marked(inputs: Inputs) -> Inputs:
    inputs = _placed(inputs)
    marker = (inputs["input_ids"] >= START) & (inputs["input_ids"] < FIRST)
    return inputs | {"image_embeds_position_mask": inputs["image_embeds_position_mask"] - marker.long()}


BUILDS = (
    Build(
        "kosmos_2",
        "kosmos-2",
        _make("Kosmos2", {"image_size": SIDE, "patch_size": PATCH}),
        _kosmos2,
        completed=_placed,
        per_token=("image_embeds_position_mask",),
    ),
    Build(
        "kosmos_2_5",
        "kosmos-2.5",
        _make("Kosmos2_5", {"head_dim": 12, "patch_embed_hidden_size": 3 * CELL**2, "max_num_patches": 64}),
        _kosmos2_5,
        completed=_placed_and_marked,
        per_token=("image_embeds_position_mask",),
    ),
)
