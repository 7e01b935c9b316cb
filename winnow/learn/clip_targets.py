"""What each token of a clip shows, and what happens to it there: supervision of the video reference model."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from winnow.reference.video import FRAMES_OF_PATCH, TOKEN_ID, VIDEO
from winnow.world.clips.draw import Stage
from winnow.world.clips.names import DIRECTIONS
from winnow.world.clips.records import Track

VISIBLE = 0.12  # share of a token's cell, over its frames, from which it shows a thing
WORDS = 3  # that name a token: its thing, its colour, its motion
NOTHING = TOKEN_ID[VIDEO]  # the word of a token that shows no thing
MARKS = ("comes", "goes", "changes", "cut")


def targets(stage: Stage, seconds: Sequence[int], grid: int) -> tuple[np.ndarray, np.ndarray]:
    """Words int16 [seconds, grid², WORDS], token ids or -1, and marks uint8 [seconds, grid², len(MARKS)]."""
    words = np.full((len(seconds), grid * grid, WORDS), -1, np.int16)
    words[..., 0] = NOTHING
    marks = np.zeros((len(seconds), grid * grid, len(MARKS)), np.uint8)
    axis, way = stage.story.pan
    for at, second in enumerate(seconds):
        if way:
            words[at, :, 2] = TOKEN_ID[DIRECTIONS[axis][way > 0]]
        marks[at, :, 3] = second in stage.story.cuts
        best = np.full((grid, grid), VISIBLE, np.float32)
        for track in stage.story.tracks:
            share = _share(track, second, stage.side, grid)
            if share is None:
                continue
            wins = share > best
            best[wins] = share[wins]
            words[at, wins.reshape(-1)] = _named(track, second)
            marks[at, wins.reshape(-1), :3] = _marked(track, second)
    return words, marks


def _share(track: Track, second: int, side: int, grid: int) -> np.ndarray | None:
    """The share of each cell that the thing's boxes of a second cover: float32 [grid, grid]."""
    boxes = [box for box in track.boxes[FRAMES_OF_PATCH * second : FRAMES_OF_PATCH * (second + 1)] if box is not None]
    if not boxes:
        return None
    edges = np.arange(grid + 1, dtype=np.float32) * (side / grid)
    covered = np.zeros((grid, grid), np.float32)
    for box in boxes:
        wide = np.clip(np.minimum(edges[1:], box.x1) - np.maximum(edges[:-1], box.x0), 0, None)
        high = np.clip(np.minimum(edges[1:], box.y1) - np.maximum(edges[:-1], box.y0), 0, None)
        covered += high[:, None] * wide
    return covered / (FRAMES_OF_PATCH * (side / grid) ** 2)


def _named(track: Track, second: int) -> tuple[int, int, int]:
    color = track.color_at(FRAMES_OF_PATCH * second)
    touched = track.partner.changes if track.partner is not None else None
    moves = track.direction and (touched is None or second < touched)
    return (
        TOKEN_ID[track.name],
        TOKEN_ID[color] if color else -1,
        TOKEN_ID[track.direction] if moves else -1,
    )


def _marked(track: Track, second: int) -> tuple[bool, bool, bool]:
    changes = track.changes if track.changes is not None or track.partner is None else track.partner.changes
    return (
        any(start == second for start, _ in track.visits),
        any(end == second + 1 for _, end in track.visits),
        changes == second,
    )
