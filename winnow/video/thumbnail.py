"""A thumbnail among the frames of a video: a picture of some of them, side by side (TS-LLaVA)."""

from dataclasses import replace
from typing import Literal

import numpy as np
import torch

from winnow.core.errors import WinnowError
from winnow.parts.thumbnail import thumbnail_of
from winnow.video.clip import Video


def with_thumbnail(
    video: Video, count: int = 6, *, where: Literal["last", "first"] = "last", together: int = 1
) -> Video:
    """The video with a thumbnail as its last or its first frame, for `ts-llava:thumbnail=last`.

    It is as large as a frame. Times go on evenly: a thumbnail that is first makes all frames one step later.
    `video.sampled` counts it as a frame that is kept, with the number −1.

    Args:
        count: frames in the thumbnail; 4, 6 or 8 in the paper.
        together: frames that the model takes as one, 2 in Qwen's models. The thumbnail then comes so many times, and
            the last frame is repeated until theirs is a multiple, so that it shares its tokens with no other.

    Raises:
        WinnowError: the video has fewer frames, or has a thumbnail already.
    """
    if where not in ("last", "first") or together < 1:
        raise WinnowError(f'where={where!r}, together={together}; allowed: "last" or "first", and an int from 1.')
    if -1 in video.sampled.numbers:
        raise WinnowError("this video has a thumbnail already; make one of the video that was opened.")
    pixels = torch.from_numpy(np.ascontiguousarray(video.frames)).permute(0, 3, 1, 2).float()
    sheet = thumbnail_of(pixels, count).round().to(torch.uint8).permute(1, 2, 0).numpy()[None].repeat(together, 0)
    filled = list(range(len(video))) + [len(video) - 1] * (-len(video) % together)
    own, numbers = video.frames[filled], tuple(video.sampled.numbers[i] for i in filled)
    frames = np.concatenate([own, sheet] if where == "last" else [sheet, own])
    given = list(video.times)
    while len(given) < len(frames):
        given.append(given[-1] + video.spacing)
    marks = (-1,) * together
    about = replace(
        video.sampled,
        rule=f"{video.sampled.rule}, and a thumbnail of {count}",
        kept=len(frames),
        numbers=numbers + marks if where == "last" else marks + numbers,
    )
    if where == "first":
        step = together * video.spacing
        given = [given[0] + i * video.spacing for i in range(together)] + [t + step for t in given[: len(own)]]
    return Video(frames, tuple(given), about)
