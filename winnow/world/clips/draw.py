"""Draw what a story tells: a background for each scene, a camera that may move, things, and the noise of a sensor."""

from __future__ import annotations

import random
from collections.abc import Sequence
from functools import cache

import numpy as np

from winnow.world import sprites
from winnow.world.backgrounds import COUNT, SIDE, bank
from winnow.world.clips.names import FPS
from winnow.world.clips.records import Track
from winnow.world.clips.story import Story
from winnow.world.items import Box
from winnow.world.names import COLORS

NOISE = 3  # the most that a value differs from frame to frame where nothing happens
WORD_SIZE = 19  # pixels of letters in a picture of 84
FADED = 0.5  # contrast of backgrounds
_NOISE_SIDE = 256


class Stage:
    """A story ready to be drawn, frame by frame; `tracks` get their boxes."""

    def __init__(self, rng: random.Random, story: Story, frames: int, side: int) -> None:
        self.story, self.frames, self.side = story, frames, side
        self.backdrops = [_backdrop(rng, side, story.pan[1]) for _ in range(len(story.cuts) + 1)]
        self.grain = rng.randrange(1 << 16)
        self.faces = [(rng.randrange(sprites.FACES), rng.random() < 0.5) for _ in story.tracks]
        for track, face in zip(story.tracks, self.faces, strict=True):
            height, width = self._alpha(track, face).shape
            track.boxes = [self._box(track, frame, width, height) for frame in range(frames)]

    def draw(self, which: Sequence[int]) -> np.ndarray:
        """uint8 [len(which), side, side, 3]."""
        return np.stack([self._frame(frame) for frame in which])

    def _frame(self, frame: int) -> np.ndarray:
        scene = sum(FPS * cut <= frame for cut in self.story.cuts)
        x, y = self._offset(frame)
        span = abs(self.story.pan[1]) // 2
        picture = self.backdrops[scene][span + y : span + y + self.side, span + x : span + x + self.side].copy()
        for track, face in zip(self.story.tracks, self.faces, strict=True):
            if track.boxes[frame] is not None:
                self._lay(picture, track, face, frame)
        shift = (self.grain + 7919 * frame) % (_NOISE_SIDE - self.side)
        other = (self.grain // 256 + 104729 * frame) % (_NOISE_SIDE - self.side)
        grain = _noise()[shift : shift + self.side, other : other + self.side]
        return np.clip(picture.astype(np.int16) + grain, 0, 255).astype(np.uint8)

    def _offset(self, frame: int) -> tuple[int, int]:
        """How far the camera stands from its middle place, (x, y)."""
        axis, way = self.story.pan
        done = round(way * (frame / (self.frames - 1) - 0.5))
        return (done, 0) if axis == 0 else (0, done)

    def _corner(self, track: Track, frame: int, width: int, height: int) -> tuple[int, int] | None:
        center = track.centers[frame]
        if center is None:
            return None
        x, y = self._offset(frame)
        return round(center[0] - width / 2) - x, round(center[1] - height / 2) - y

    def _box(self, track: Track, frame: int, width: int, height: int) -> Box | None:
        corner = self._corner(track, frame, width, height)
        if corner is None:
            return None
        x, y = corner
        box = Box(max(0, x), max(0, y), min(self.side, x + width), min(self.side, y + height))
        return box if box.x0 < box.x1 and box.y0 < box.y1 else None

    def _alpha(self, track: Track, face: tuple[int, bool]) -> np.ndarray:
        if track.kind == "text":
            return sprites.word(track.name, face[0], round(WORD_SIZE * self.side / 84))
        if track.kind == "shape":
            return sprites.shape(track.name, track.extent)[1]
        return sprites.glyph(track.name, track.extent)[..., 3]

    def _lay(self, picture: np.ndarray, track: Track, face: tuple[int, bool], frame: int) -> None:
        alpha = self._alpha(track, face)
        corner = self._corner(track, frame, alpha.shape[1], alpha.shape[0])
        if corner is None:
            return
        if track.kind == "text":
            dark, light = (np.full((1, 1, 3), value, np.uint8) for value in (25, 235))
            paper, ink = (dark, light) if face[1] else (light, dark)
            _blend(picture, *corner, paper, np.full_like(alpha, 255))
            _blend(picture, *corner, ink, alpha)
        elif track.kind == "shape":
            paint = np.array(COLORS[track.color_at(frame)], np.uint8)[None, None]
            halo = np.full((1, 1, 3), 0 if paint.mean() > 110 else 255, np.uint8)
            _blend(picture, *corner, halo, alpha // 2)
            _blend(picture, *corner, paint, sprites.shape(track.name, track.extent)[0])
        else:
            sprite = sprites.glyph(track.name, track.extent)
            sprite = sprite[:, ::-1] if track.mirrored else sprite
            _blend(picture, *corner, sprite[..., :3], sprite[..., 3])


def _blend(picture: np.ndarray, x: int, y: int, color: np.ndarray, alpha: np.ndarray) -> None:
    """Lay `color` over the picture with `alpha`, cut off at the edges."""
    height, width = alpha.shape
    rows = slice(max(0, -y), min(height, picture.shape[0] - y))
    columns = slice(max(0, -x), min(width, picture.shape[1] - x))
    color = np.broadcast_to(color, (height, width, 3))[rows, columns].astype(np.uint16)
    weight = alpha[rows, columns].astype(np.uint16)[..., None]
    under = picture[y + rows.start : y + rows.stop, x + columns.start : x + columns.stop]
    under[:] = ((color * weight + under * (255 - weight)) // 255).astype(np.uint8)


def _backdrop(rng: random.Random, side: int, way: int) -> np.ndarray:
    """A piece of a background, wide enough for the camera's way, its contrast reduced: things are small."""
    whole = side + 2 * (abs(way) // 2) + 1
    y, x = rng.randrange(SIDE - whole + 1), rng.randrange(SIDE - whole + 1)
    view = bank()[rng.randrange(COUNT)][y : y + whole, x : x + whole].astype(np.float32)
    middle = view.mean((0, 1))
    return (middle + (view - middle) * FADED).astype(np.uint8)


@cache
def _noise() -> np.ndarray:
    """int16 [_NOISE_SIDE, _NOISE_SIDE, 3], the same for all clips, which take pieces of it."""
    rng = np.random.default_rng(7)
    return rng.integers(-NOISE, NOISE + 1, (_NOISE_SIDE, _NOISE_SIDE, 3), np.int16)
