"""Qwen2-Audio: Whisper's encoder, pooled by 2, so that a token covers 40 ms of a sound.

A sound is padded to 30 s before it is encoded. The model takes the tokens of the padding out before they enter the
language model, by `feature_attention_mask`; none of them is part of an item. The class has no method that encodes
sounds: its encoder is called from the forward, and its own forward is listened to.
"""

from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor

from winnow.core.errors import UnsupportedError
from winnow.core.layout import Layout
from winnow.models.family import Encoding, Family, token_starts

HOP = 0.01  # seconds from one mel frame to the next, in Whisper's feature extractor
FRAMES = 4  # mel frames of a token: the second convolution and the pooling each halve them


class Qwen2Audio(Family):
    name = "qwen2_audio"
    model_types = ("qwen2_audio",)
    tower = blocks = projector = None
    encoders = (("audio_tower.forward", "audio", "audio_token_id"),)
    beside = ("feature_attention_mask",)
    points: ClassVar[tuple[str, ...]] = ("projected", "layers")
    short = True

    def rows(self, output: Any) -> Any:
        return output.last_hidden_state

    def lengths(self, model: Any, encoding: Encoding, pooled: Sequence[Tensor]) -> tuple[int, ...]:
        mask = encoding.inputs.get("feature_attention_mask")
        if mask is None:
            raise UnsupportedError(
                f"{type(model).__name__} was asked to encode sounds without feature_attention_mask, which tells sound "
                "from padding; call the model with what its processor gives, or detach() before its encoder is "
                "called alone."
            )
        return tuple(model.base_model.audio_tower._get_feat_extract_output_lengths(mask.sum(-1))[1].tolist())

    def layouts(self, model: Any, encoding: Encoding) -> tuple[Layout, ...]:
        return tuple(Layout.sound(n, FRAMES * HOP) for n in encoding.lengths)

    def patches(self, model: Any, encoding: Encoding) -> Tensor:
        """The mel frames behind each token."""
        mels = encoding.inputs["input_features"].transpose(1, 2)  # sounds, frames, bands
        return torch.cat(
            [own[: n * FRAMES].unflatten(0, (n, FRAMES)) for own, n in zip(mels, encoding.lengths, strict=True)]
        )

    def cell_starts(self, model: Any, encoding: Encoding) -> tuple[int, ...]:
        return token_starts(encoding)
