"""Drives from a seed: a vehicle with four cameras among moving shapes, for detection in three dimensions.

It is a toy at the scale of a unit test: frames of 64 pixels, flat shapes that always face the camera, backgrounds
infinitely far away, no occlusion by anything but nearer shapes, and exact poses. It has what a detector with memory
needs: several cameras, motion of its own and of others, and things that catch the eye and are no objects.

Frames of reference: x forward, y left, z up, in metres; seconds; yaw counts to the left.
"""

from __future__ import annotations

import math
import random
from dataclasses import dataclass

import numpy as np
from PIL import Image

from winnow.world.backgrounds import COUNT, SIDE, bank
from winnow.world.items import Box
from winnow.world.names import CLUTTER, COLORS
from winnow.world.scenes import SEEDS_PER_SPLIT
from winnow.world.sprites import glyph, shape

CAMERAS, PIXELS = 4, 64  # front, left, back, right; each sees 90°
FOCAL = PIXELS / 2
HEIGHT = 1.5  # of the cameras
KINDS = ("circle", "square", "triangle", "cross")
SPLITS = ("train", "test")
INTERVAL = 0.5
NEAREST, FARTHEST = 2.0, 14.0
STICKERS = 10


@dataclass(frozen=True, slots=True)
class Thing:
    """An object in the frame of the vehicle.

    Attributes:
        number: the same in all frames.
        center: (x, y, z).
        velocity: (x, y) over ground, along the vehicle's axes.
        boxes: camera to where it is seen there.
    """

    number: int
    kind: int
    center: tuple[float, float, float]
    size: float
    velocity: tuple[float, float]
    boxes: dict[int, Box]


@dataclass(frozen=True, slots=True)
class Frame:
    """What the cameras see at one moment: uint8 `[cameras, 64, 64, 3]`, where the vehicle is, and what is around it."""

    time: float
    images: np.ndarray
    position: tuple[float, float]
    yaw: float
    things: tuple[Thing, ...]


def drive(seed: int, frames: int = 3, split: str = "train") -> tuple[Frame, ...]:
    """The frames of a seed; each split has seeds of its own."""
    rng = random.Random((SPLITS.index(split) + 8) * SEEDS_PER_SPLIT + seed)
    panorama = _panorama(rng)
    speed, turn = rng.uniform(0, 3), rng.uniform(-0.35, 0.35)
    things = []
    for _ in range(rng.randint(4, 8)):
        distance, angle = rng.uniform(3, 11), rng.uniform(-math.pi, math.pi)
        heading, pace = rng.uniform(-math.pi, math.pi), rng.uniform(0, 2)
        at = distance * math.cos(angle), distance * math.sin(angle)
        going = pace * math.cos(heading), pace * math.sin(heading)
        looks = rng.randrange(len(KINDS)), rng.choice(list(COLORS.values()))
        things.append((at, going, rng.uniform(0.4, 2.4), rng.uniform(1.0, 2.2), *looks))
    return tuple(_frame(panorama, things, speed, turn, number) for number in range(frames))


def project(center: tuple[float, float, float], camera: int) -> tuple[float, float, float]:
    """(column, row, depth) of a point in the frame of the vehicle; seen where the depth is positive."""
    x, y, z = center
    angle = camera * math.pi / 2
    depth = x * math.cos(angle) + y * math.sin(angle)
    right = x * math.sin(angle) - y * math.cos(angle)
    safe = max(abs(depth), 1e-6)
    return FOCAL + FOCAL * right / safe, FOCAL - FOCAL * (z - HEIGHT) / safe, depth


def _panorama(rng: random.Random) -> np.ndarray:
    y, x = rng.randrange(SIDE - PIXELS), rng.randrange(SIDE - CAMERAS * PIXELS)
    picture = bank()[rng.randrange(COUNT)][y : y + PIXELS, x : x + CAMERAS * PIXELS].copy()
    for _ in range(STICKERS):
        sticker = glyph(rng.choice(CLUTTER), rng.randint(8, 18))
        h, w = sticker.shape[:2]
        _lay(picture, sticker, rng.randrange(picture.shape[1] - w), rng.randrange(PIXELS - h))
    return picture


def _frame(panorama: np.ndarray, things: list[tuple], speed: float, turn: float, number: int) -> Frame:
    time, yaw = number * INTERVAL, turn * number * INTERVAL
    # The path of constant speed and turn, by its mean direction.
    position = speed * time * math.cos(yaw / 2), speed * time * math.sin(yaw / 2)
    wide = panorama.shape[1]
    shift = round(yaw / (2 * math.pi) * wide)
    images = np.stack(
        [np.roll(panorama, shift + PIXELS * (1 + camera), axis=1)[:, :PIXELS] for camera in range(CAMERAS)]
    )
    c, s = math.cos(yaw), math.sin(yaw)
    seen = []
    for index, (at, going, height, size, kind, color) in enumerate(things):
        dx, dy = at[0] + going[0] * time - position[0], at[1] + going[1] * time - position[1]
        center = c * dx + s * dy, c * dy - s * dx, height
        velocity = c * going[0] + s * going[1], c * going[1] - s * going[0]
        if NEAREST < math.hypot(*center[:2]) < FARTHEST:
            seen.append((Thing(index, kind, center, size, velocity, {}), color))
    for thing, color in sorted(seen, key=lambda pair: -math.hypot(*pair[0].center[:2])):
        _draw(images, thing, color)
    return Frame(time, images, position, yaw, tuple(thing for thing, _ in seen if thing.boxes))


def _draw(images: np.ndarray, thing: Thing, color: tuple[int, int, int]) -> None:
    ink, halo = shape(KINDS[thing.kind], 32)
    for camera in range(CAMERAS):
        column, row, depth = project(thing.center, camera)
        if depth < 0.5:
            continue
        extent = max(3, round(FOCAL * thing.size / depth))
        x, y = round(column - extent / 2), round(row - extent / 2)
        box = Box(max(0, x), max(0, y), min(PIXELS, x + extent), min(PIXELS, y + extent))
        if box.x1 - box.x0 < 2 or box.y1 - box.y0 < 2:
            continue
        edge = 255 if sum(color) < 380 else 0
        pixels = np.where(ink[..., None] > 127, np.array(color), edge).astype(np.uint8)
        sprite = Image.fromarray(np.concatenate([pixels, halo[..., None]], -1))
        _lay(images[camera], np.asarray(sprite.resize((extent, extent), Image.Resampling.BILINEAR)), x, y)
        thing.boxes[camera] = box


def _lay(picture: np.ndarray, sprite: np.ndarray, x: int, y: int) -> None:
    """Blend RGBA into a picture; what lies outside is cut off."""
    x0, y0 = max(0, x), max(0, y)
    x1, y1 = min(picture.shape[1], x + sprite.shape[1]), min(picture.shape[0], y + sprite.shape[0])
    own = sprite[y0 - y : y1 - y, x0 - x : x1 - x].astype(np.uint16)
    under = picture[y0:y1, x0:x1]
    under[:] = ((own[..., :3] * own[..., 3:] + under * (255 - own[..., 3:])) // 255).astype(np.uint8)
