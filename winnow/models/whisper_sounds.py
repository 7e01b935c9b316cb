"""Sounds behind Whisper's front end: mel frames of 10 ms, of which four make a token."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from winnow.core.errors import UnsupportedError
from winnow.core.layout import Layout
from winnow.models.family import Encoding

HOP = 0.01  # seconds from one mel frame to the next, in Whisper's feature extractor
FRAMES = 4  # mel frames of a token: the second convolution and the pooling each halve them


def sound_lengths(model: Any, tower: Any, encoding: Encoding) -> tuple[int, ...]:
    """Tokens of each sound, without its padding."""
    mask = encoding.inputs.get("feature_attention_mask")
    if mask is None:
        raise UnsupportedError(
            f"{type(model).__name__} was asked to encode sounds without feature_attention_mask, which tells sound from "
            "padding; call the model with what its processor gives, or detach() before its encoder is called alone."
        )
    return tuple(tower._get_feat_extract_output_lengths(mask.sum(-1))[1].tolist())


def sound_layouts(encoding: Encoding) -> tuple[Layout, ...]:
    """A row of tokens for each sound."""
    return tuple(Layout.sound(n, FRAMES * HOP) for n in encoding.lengths)


def sound_cells(tower: Any, encoding: Encoding, values: Sequence[Tensor]) -> Tensor:
    """`[tokens, …]` what a layer of the encoder shows of each token: the mean over the two frames that are pooled.

    Args:
        values: `[calls][1, frames, …]` of stretches of the sounds, one behind the other, without their padding.
    """
    frames, tokens = tower._get_feat_extract_output_lengths(encoding.inputs["feature_attention_mask"].sum(-1))
    own = torch.cat([x.flatten(0, 1) for x in values]).split(frames.tolist())
    return torch.cat([x[: 2 * n].unflatten(0, (n, 2)).mean(1) for x, n in zip(own, tokens.tolist(), strict=True)])


def sound_patches(encoding: Encoding) -> Tensor:
    """`[tokens, 4, bands]` the mel frames behind each token of all sounds."""
    mels = encoding.inputs["input_features"].transpose(1, 2)  # sounds, frames, bands
    parts = zip(mels, encoding.lengths, strict=True)
    return torch.cat([own[: n * FRAMES].unflatten(0, (n, FRAMES)) for own, n in parts])
