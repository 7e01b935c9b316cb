"""A picture being drawn: pixels, which of them are taken, and the blending of sprites into it."""

from __future__ import annotations

import random

import numpy as np

from winnow.world.backgrounds import COUNT, SIDE, bank
from winnow.world.items import Box


class Canvas:
    """A background cut at random from the bank, and a mask of the pixels that something already occupies."""

    def __init__(self, rng: random.Random, size: int) -> None:
        self.rng, self.size = rng, size
        picture = bank()[rng.randrange(COUNT)]
        y, x = rng.randrange(SIDE - size + 1), rng.randrange(SIDE - size + 1)
        view = picture[y : y + size, x : x + size]
        if rng.random() < 0.5:
            view = view[:, ::-1]
        if rng.random() < 0.25:
            view = view.transpose(1, 0, 2)
        if rng.random() < 0.2:
            view = 255 - view
        self.pixels = np.ascontiguousarray(view[..., rng.choice(((0, 1, 2), (2, 1, 0), (1, 2, 0)))])
        self.taken = np.zeros((size, size), bool)

    def free(self, width: int, height: int, margin: int = 2, tries: int = 20) -> Box | None:
        """A free place of width × height with `margin` empty pixels around it, or None after `tries` misses."""
        if width > self.size or height > self.size:
            return None
        for _ in range(tries):
            y, x = self.rng.randrange(self.size - height + 1), self.rng.randrange(self.size - width + 1)
            around = self.taken[max(0, y - margin) : y + height + margin, max(0, x - margin) : x + width + margin]
            if not around.any():
                return Box(x, y, x + width, y + height)
        return None

    def take(self, box: Box) -> None:
        self.taken[box.y0 : box.y1, box.x0 : box.x1] = True

    def fill(self, box: Box, color: tuple[int, int, int] | int) -> None:
        self.pixels[box.y0 : box.y1, box.x0 : box.x1] = color

    def blend(self, x: int, y: int, color: np.ndarray, alpha: np.ndarray) -> None:
        """Lay `color` (uint8, [h, w, 3] or broadcastable to it) over the picture with `alpha` (uint8 [h, w])."""
        height, width = alpha.shape
        under = self.pixels[y : y + height, x : x + width]
        weight = alpha.astype(np.uint16)[..., None]
        under[:] = ((color.astype(np.uint16) * weight + under * (255 - weight)) // 255).astype(np.uint8)
