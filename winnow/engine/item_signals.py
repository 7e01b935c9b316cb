"""Signals of the encoders for an item in the language model's sequence: its own, or those of the sound beside it."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from winnow.core.errors import UnsupportedError
from winnow.core.signal import Signal
from winnow.engine.bound_model import BoundModel
from winnow.engine.encoder import lm_signal
from winnow.engine.encoding import EncoderRecord
from winnow.engine.item_tokens import ItemTokens


def item_signal(
    bound: BoundModel,
    item: ItemTokens,
    items: Sequence[ItemTokens],
    encoded: Callable[[Any], EncoderRecord],
    signal: Signal,
) -> Tensor:
    """`[n, …]` for the tokens of an item; of a signal `beside`, `[A, …]` for those of its sound, and `[0]` without one.

    Args:
        items: of the request.
        encoded: of an item, the record of its encoder call.
    """
    device = item.ids.device
    if not signal.beside:
        return lm_signal(bound, encoded(item), item.number, signal).to(device)[item.ids]
    sound = sound_of(item, items)
    if sound is None:
        return torch.zeros(0, device=device)
    return lm_signal(bound, encoded(sound), sound.number, signal).to(device)


def sound_of(item: ItemTokens, items: Sequence[ItemTokens]) -> ItemTokens | None:
    """The sound that belongs to a video: in their prompt, the first one to the first one; None where there is none.

    Raises:
        UnsupportedError: there are more of the ones than of the others.
    """
    row = [other for other in items if other.row == item.row]
    sounds = [other for other in row if other.record.modality == "audio"]
    videos = [other for other in row if other.record.modality == item.record.modality]
    if sounds and len(sounds) != len(videos):
        raise UnsupportedError(
            f"prompt {item.row} has {len(videos)} videos and {len(sounds)} sounds, so it is not known which sound "
            "belongs to which video; give each video one sound, or none of them, or use a method that does not hear."
        )
    return sounds[next(i for i, video in enumerate(videos) if video is item)] if sounds else None
