"""Videos of any size and rate as the video reference model reads them: whole, or second by second in a stream."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from jaxtyping import Int, UInt8
from PIL import Image
from torch import Tensor

from winnow.core.errors import WinnowError
from winnow.reference.video import BEFORE, FRAMES_OF_PATCH, TOKEN_ID, VIDEO, ClipProcessor, knows, places
from winnow.reference.vocabulary import split_words
from winnow.video import Video

CHECKPOINT = "Qwen/Qwen2.5-VL-3B-Instruct"  # what a video that the bundled model does not know is for
BUNDLED = "bundled video reference model"
EXAMPLE = "is there a frog?"
SIDE = 84  # pixels of the frames that it was trained on
CHECKPOINT = "Qwen/Qwen2.5-VL-3B-Instruct"  # what a video that the bundled model does not know is for
BUNDLED = "bundled video reference model"
EXAMPLE = "is there a frog?"
_ANY = "is"  # a question, where only what stands before it is wanted


def check_words(question: str) -> None:
    """Refuse a question that the bundled model cannot read."""
    unknown = [word for word in split_words(question) if not knows(word)]
    if unknown:
        raise WinnowError(
            f"the {BUNDLED} does not know the words {', '.join(unknown)}: ask as winnow's clips do ({EXAMPLE!r}), or "
            f"use a real checkpoint: --model {CHECKPOINT}."
        )


def fitted(frames: Sequence[np.ndarray] | UInt8[np.ndarray, "t h w 3"]) -> UInt8[np.ndarray, "u s s 3"]:
    """Frames as the model takes them: squares of 84 pixels, each the mean of what it covers, and an even number.

    What is no square is squeezed. Of an odd number the last frame comes twice.
    """
    small = [np.asarray(Image.fromarray(frame).resize((SIDE, SIDE), Image.Resampling.BOX)) for frame in frames]
    return np.stack(small + small[-1:] * (len(small) % FRAMES_OF_PATCH))


def clip_inputs(model: Any, processor: ClipProcessor, video: Video, question: str) -> dict[str, Tensor]:
    """The keyword arguments of `model.generate`, on the model's device and in its dtype.

    Raises:
        WinnowError: the question is empty, or has words that the model does not know.
    """
    made = processor(fitted(video.frames), question)
    made["second_per_grid_ts"] = torch.tensor([FRAMES_OF_PATCH * video.spacing])
    return {n: x.to(model.device, model.dtype if n == "pixel_values_videos" else None) for n, x in made.items()}


@dataclass(eq=False)
class ClipStream:
    """What `winnow.stream` is fed of a clip, without its `processor=`: two frames, which are a second, are a part.

    Parts stand where the seconds of one video stand, with nothing between them: read in full, they are to the model
    what the clip is.

    Attributes:
        seconds: that were given so far.
    """

    model: Any
    processor: ClipProcessor
    seconds: int = 0
    _waiting: list[np.ndarray] = field(default_factory=list)

    def parts(self, frame: UInt8[np.ndarray, "h w 3"]) -> list[dict[str, Tensor]]:
        """What to feed now that this frame came: a second, where it is its last frame."""
        self._waiting.append(frame)
        return self.rest() if len(self._waiting) == FRAMES_OF_PATCH else []

    def rest(self) -> list[dict[str, Tensor]]:
        """What to feed at the end: the second that has begun, if one has."""
        if not self._waiting:
            return []
        made = self.processor(fitted(self._waiting), _ANY)
        self._waiting = []
        cells = int((made["input_ids"] == TOKEN_ID[VIDEO]).sum())
        end = len(BEFORE) + cells
        table = places(self.model, self.seconds + 1, cells, 1)
        first = 0 if self.seconds == 0 else len(BEFORE)
        self.seconds += 1
        return [
            {
                "input_ids": made["input_ids"][:, first:end],
                "position_ids": table[:, None, first - end - 1 :] if first else table[:, None],
                "pixel_values_videos": made["pixel_values_videos"],
                "video_grid_thw": made["video_grid_thw"],
            }
        ]

    def question(self, text: str) -> Int[Tensor, "1 m"]:
        """All that stands behind the last second.

        Raises:
            WinnowError: the question is empty, or has words that the model does not know.
        """
        ids = self.processor(np.zeros((FRAMES_OF_PATCH, SIDE, SIDE, 3), np.uint8), text)["input_ids"]
        last = int((ids[0] == TOKEN_ID[VIDEO]).nonzero()[-1])
        return ids[:, last + 1 :]

    def said(self, answer: Int[Tensor, "1 n"]) -> str:
        """An answer in words."""
        return str(self.processor.tokenizer.decode(answer[0], skip_special_tokens=True)).strip()
