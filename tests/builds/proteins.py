"""Evolla: a protein instead of a picture, which some layers of the language model read through gated cross-attention.

A, B and C are proteins of different lengths, without pixels; a batch pads them on the right. A resampler makes as many
latents of each. The base model is the decoder itself; its layers get the padding mask beside the causal one.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn
from transformers import EvollaConfig, EvollaForProteinText2Text

from builds.build import Build, Inputs, Picture

_LENGTHS = {"A": 12, "B": 20, "C": 16}
PROTEIN_PAD, PROTEIN_IDS = 1, (5, 64)


def _evolla(text: dict[str, Any]) -> nn.Module:
    config = EvollaConfig(
        protein_encoder_config={
            "vocab_size": PROTEIN_IDS[1],
            "hidden_size": 48,
            "intermediate_size": 96,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
        },
        aligner_num_add_layers=2,
        resampler_depth=2,
        resampler_dim_head=16,
        resampler_heads=4,
        resampler_num_latents=8,
        **text,
    )
    return EvollaForProteinText2Text(config)


def _protein(letter: str, generator: torch.Generator) -> Picture:
    ids = torch.randint(*PROTEIN_IDS, (1, _LENGTHS[letter]), generator=generator)
    return [], {"protein_input_ids": ids, "protein_attention_mask": torch.ones_like(ids)}


def _joined(proteins: Sequence[Inputs]) -> Inputs:
    """Proteins padded on the right to the longest."""
    if not proteins:
        return {}
    width = max(protein["protein_input_ids"].shape[1] for protein in proteins)
    fills = {"protein_input_ids": PROTEIN_PAD, "protein_attention_mask": 0}
    return {
        name: torch.cat([nn.functional.pad(p[name], (0, width - p[name].shape[1]), value=fill) for p in proteins])
        for name, fill in fills.items()
    }


READ = "a protein takes the picture's place, and words read it through cross-attention"

BUILDS = (Build("evolla", "evolla", _evolla, _protein, joined=_joined, cannot=READ),)
