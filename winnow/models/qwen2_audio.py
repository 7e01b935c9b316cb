"""Qwen2-Audio: Whisper's encoder, pooled by 2, so that a token covers 40 ms of a sound.

A sound is padded to 30 s before it is encoded. The model takes the tokens of the padding out before they enter the
language model, by `feature_attention_mask`; none of them is part of an item. The class has no method that encodes
sounds: its encoder is called from the forward, and its own forward is listened to.
"""

from collections.abc import Sequence
from typing import Any, ClassVar

from torch import Tensor

from winnow.core.layout import Layout
from winnow.models.family import Encoding, Family, token_starts
from winnow.models.whisper_sounds import sound_layouts, sound_lengths, sound_patches


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
        return sound_lengths(model, model.base_model.audio_tower, encoding)

    def layouts(self, model: Any, encoding: Encoding) -> tuple[Layout, ...]:
        return sound_layouts(encoding)

    def patches(self, model: Any, encoding: Encoding) -> Tensor:
        return sound_patches(encoding)

    def cell_starts(self, model: Any, encoding: Encoding) -> tuple[int, ...]:
        return token_starts(encoding)
