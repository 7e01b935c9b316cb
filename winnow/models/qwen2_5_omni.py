"""The thinker of Qwen2.5-Omni: pictures and videos as Qwen2.5-VL has them, and sounds of 40 ms a token.

Sounds are items for methods of sounds alone. Under any other plan they stand in the sequence as text does.
"""

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from winnow.core.layout import Layout
from winnow.models.family import Encoding
from winnow.models.patch_grids import WindowedPatchGrids
from winnow.models.whisper_sounds import sound_cells, sound_layouts, sound_lengths, sound_patches


class Qwen25Omni(WindowedPatchGrids):
    name = "qwen2_5_omni"
    model_types = ("qwen2_5_omni_thinker",)
    ear = "audio_tower.layers"
    encoders = (*WindowedPatchGrids.encoders, ("get_audio_features", "audio", "audio_token_id"))

    def rows(self, output: Any) -> Any:
        found = super().rows(output)
        return getattr(output, "last_hidden_state", None) if found is None else found

    def lengths(self, model: Any, encoding: Encoding, pooled: Sequence[Tensor]) -> tuple[int, ...]:
        if encoding.modality == "audio":
            return sound_lengths(model, model.base_model.audio_tower, encoding)
        return super().lengths(model, encoding, pooled)

    def layouts(self, model: Any, encoding: Encoding) -> tuple[Layout, ...]:
        return sound_layouts(encoding) if encoding.modality == "audio" else super().layouts(model, encoding)

    def cells(self, model: Any, encoding: Encoding, values: Sequence[Tensor]) -> Tensor:
        if encoding.modality == "audio":
            return sound_cells(model.base_model.audio_tower, encoding, values)
        return super().cells(model, encoding, values)

    def patches(self, model: Any, encoding: Encoding) -> Tensor:
        return sound_patches(encoding) if encoding.modality == "audio" else super().patches(model, encoding)
