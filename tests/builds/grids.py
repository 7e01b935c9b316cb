"""Pictures and videos as grids of patches, which the Qwen-VL family and its kin share: pixels are rows of flat patches,
`image_grid_thw` gives frames, rows and columns, and 2 × 2 patches become one token."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from builds.build import TEXT, Inputs, Picture, by_name

IMAGE, VIDEO, START, END, VIDEO_START, VIDEO_END, AUDIO, AUDIO_START, AUDIO_END, MARK = range(250, 240, -1)
PATCH, MERGE = 4, 2
ONE_FRAME, TWO_FRAMES, UNROLLED = (3 * PATCH * PATCH,), (3 * 2 * PATCH * PATCH,), (3, PATCH, PATCH)  # values of a patch
# Patches. A and B leave windows that are not full; V has two temporal patches.
GRIDS = {"A": (1, 10, 8), "B": (1, 4, 14), "C": (1, 8, 6), "V": (2, 6, 8)}

VISION_IDS = {
    "image_token_id": IMAGE,
    "video_token_id": VIDEO,
    "vision_start_token_id": START,
    "vision_end_token_id": END,
}
MROPE = {"rope_type": "default", "mrope_section": [2, 3, 3], "rope_theta": 10000.0}  # a head of 16


def tower(**overrides: object) -> dict[str, object]:
    """The settings that the vision encoders of these classes share."""
    return {"depth": 3, "hidden_size": 48, "intermediate_size": 96, "num_heads": 4, "patch_size": PATCH} | overrides


def in_run(grid: tuple[int, int, int]) -> list[int]:
    """A video as one run of placeholders."""
    t, h, w = grid
    return [START, *[VIDEO] * (t * h * w // MERGE**2), END]


def in_frames(grid: tuple[int, int, int]) -> list[int]:
    """A video as one run for each frame, with the text of its time before it."""
    t, h, w = grid
    return [i for frame in range(t) for i in (TEXT[0] + frame, START, *[VIDEO] * (h * w // MERGE**2), END)]


def in_pictures(grid: tuple[int, int, int]) -> list[int]:
    """A video as pictures between marks of the video, with the text of its time after each."""
    t, h, w = grid
    frames = [i for frame in range(t) for i in (START, *[IMAGE] * (h * w // MERGE**2), END, TEXT[0] + frame)]
    return [VIDEO_START, *frames, VIDEO_END]


def pictures(
    video: Callable[[tuple[int, int, int]], list[int]] | None = None, *, values: tuple[int, ...] = TWO_FRAMES
) -> Callable[[str, torch.Generator], Picture]:
    """`Build.picture` of a class: how it writes videos, and the shape of a patch. Pixels are (patches, *values)."""

    def picture(letter: str, generator: torch.Generator) -> Picture:
        grid = GRIDS[letter]
        t, h, w = grid
        pixels = torch.randn(t * h * w, *values, generator=generator)
        sizes = torch.tensor([grid])
        if video is not None and letter == "V":
            return video(grid), {"pixel_values_videos": pixels, "video_grid_thw": sizes}
        ids = [START, *[IMAGE] * (h * w // MERGE**2), END]
        return ids, {"pixel_values": pixels, "image_grid_thw": sizes}

    return picture


def token_types(ids: Tensor) -> Tensor:
    """Text 0, picture 1, video 2 for each token, as processors tell it to M-RoPE."""
    within = (ids == VIDEO_START).cumsum(-1) > (ids == VIDEO_END).cumsum(-1)
    return (ids == IMAGE).long() + (within & (ids == IMAGE)) + 2 * (ids == VIDEO)


def typed(inputs: Inputs) -> Inputs:
    """`Build.completed` of the classes that take M-RoPE positions from token types."""
    return inputs | {"mm_token_type_ids": token_types(inputs["input_ids"])}


TYPED = {"completed": typed, "per_token": ("mm_token_type_ids",), "joined": by_name}
