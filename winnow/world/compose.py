"""Place things on a canvas: glyphs and shapes with or without labels, charts, documents, clutter."""

from __future__ import annotations

import random
from dataclasses import dataclass

import numpy as np

from winnow.world import sprites
from winnow.world.canvas import Canvas
from winnow.world.items import Box, Item, Kind
from winnow.world.names import CLUTTER, COLORS, GLYPHS, HELD_OUT, SHAPES, WORDS

EXTENTS = (30, 36, 42, 48, 56, 64)  # of glyphs and shapes in a picture of 224 pixels
LETTER_SIZES = (19, 21, 24)
BAR_HEIGHTS = (0.2, 0.38, 0.56, 0.74, 0.95)


@dataclass(frozen=True)
class Spec:
    """What a scene contains. Ranges are inclusive; shares are probabilities.

    `things` glyphs and shapes are planned; `group` is the share of scenes in which one kind comes several times;
    `labelled` lists the shares of labelled things from which each scene picks one.
    """

    things: tuple[int, int] = (2, 8)
    group: float = 0.6
    labelled: tuple[float, ...] = (0.0, 0.4, 0.7)
    shapes: float = 0.45
    chart: float = 0.25
    document: float = 0.2
    lines: tuple[int, int] = (2, 4)  # of a document
    clutter: tuple[int, int] = (0, 3)
    blobs: tuple[int, int] = (0, 2)
    held_out: float | None = None  # share of glyphs drawn from HELD_OUT; None: as often as any other


@dataclass(frozen=True)
class Plan:
    """A thing to be placed; `color` is empty for glyphs."""

    name: str
    color: str = ""


def compose(rng: random.Random, size: int, spec: Spec) -> tuple[Canvas, list[Item]]:
    """Draw one scene. Items come in drawing order; a label follows its thing."""
    canvas = Canvas(rng, size)
    scale = size / 224
    for _ in range(rng.randint(*spec.blobs)):
        _blob(canvas, scale)
    items: list[Item] = []
    if rng.random() < spec.chart:
        items += _chart(canvas, scale)
    if rng.random() < spec.document:
        items += _document(canvas, scale, rng.randint(*spec.lines))
    plans = _plan(rng, spec)
    labelled = rng.choice(spec.labelled)
    largest = len(EXTENTS) - (0 if len(plans) <= 4 else 1 if len(plans) <= 7 else 2)
    used: set[str] = {item.text for item in items}
    for plan in plans:
        extent = round(EXTENTS[rng.randrange(largest)] * (1 + (scale - 1) / 2))
        label = _label_text(rng, used) if rng.random() < labelled else ""
        items += _thing(canvas, plan, extent, label, scale)
    for _ in range(rng.randint(*spec.clutter)):
        items += _clutter(canvas, scale)
    return canvas, items


def _plan(rng: random.Random, spec: Spec) -> list[Plan]:
    """Names and colours. With the share `group` one kind comes 2 to 5 times, so that counts are about balanced."""
    total = rng.randint(*spec.things)
    plans: list[Plan] = []
    if total > 2 and rng.random() < spec.group:
        several = rng.choice([n for n in (2, 2, 3, 3, 4, 4, 4, 5, 5, 5) if n <= total])
        if rng.random() < 0.5:
            plans = [Plan(_glyph(rng, spec))] * several
        else:
            name, color, other = rng.choice(SHAPES), *rng.sample(list(COLORS), 2)
            alike = rng.randint(several // 2, several)
            plans = [Plan(name, color)] * alike + [Plan(name, other) for _ in range(several - alike)]
            if rng.random() < 0.7:  # the same colour on another shape: conditions need both words
                plans.append(Plan(rng.choice(SHAPES), color))
    while len(plans) < total:
        if rng.random() < spec.shapes:
            plans.append(Plan(rng.choice(SHAPES), rng.choice(list(COLORS))))
        else:
            plans.append(Plan(_glyph(rng, spec)))
    rng.shuffle(plans)
    return plans


def _glyph(rng: random.Random, spec: Spec) -> str:
    if spec.held_out is not None and rng.random() < spec.held_out:
        return rng.choice(sorted(HELD_OUT))
    return rng.choice(GLYPHS)


def _label_text(rng: random.Random, used: set[str]) -> str:
    """A word or two-digit number that this scene does not show yet; empty when the draw is one that it does."""
    text = f"{rng.randrange(100):02d}" if rng.random() < 0.35 else rng.choice(WORDS)
    if text in used:
        return ""
    used.add(text)
    return text


def _paint(rng: random.Random, color: str) -> np.ndarray:
    """The named colour, slightly varied: uint8 [1, 1, 3]."""
    shade = [min(255, max(0, value + rng.randint(-12, 12))) for value in COLORS[color]]
    return np.array(shade, np.uint8)[None, None]


def _thing(canvas: Canvas, plan: Plan, extent: int, label: str, scale: float) -> list[Item]:
    """Draw a glyph or a shape and its label, if there is room."""
    rng = canvas.rng
    if plan.color:
        ink, alpha = sprites.shape(plan.name, extent)
        paint = _paint(rng, plan.color)
    else:
        sprite = sprites.glyph(plan.name, extent)
        if rng.random() < 0.5:
            sprite = sprite[:, ::-1]
        paint, alpha = sprite[..., :3], sprite[..., 3]
    height, width = alpha.shape
    mask = _label_mask(rng, label, scale) if label else None
    if mask is None:
        box = canvas.free(width, height)
        above = False
    else:  # room for both; wider margin, so that no other thing is as near to the label
        box = canvas.free(max(width, mask.shape[1]), height + mask.shape[0] + 2, margin=7)
        above = rng.random() < 0.5
    if box is None:
        return []
    canvas.take(box)
    x = box.x0 + (box.x1 - box.x0 - width) // 2
    y = box.y0 + (mask.shape[0] + 2 if mask is not None and above else 0)
    if plan.color:
        halo = np.full((1, 1, 3), 0 if paint.mean() > 110 else 255, np.uint8)
        canvas.blend(x, y, halo, alpha // 2)
        canvas.blend(x, y, paint, ink)
    else:
        canvas.blend(x, y, paint, alpha)
    kind: Kind = "shape" if plan.color else "glyph"
    thing = Item(kind, plan.name, Box(x, y, x + width, y + height), color=plan.color, alpha=alpha)
    if mask is None:
        return [thing]
    label_x = box.x0 + (box.x1 - box.x0 - mask.shape[1]) // 2
    text = _write(canvas, label_x, box.y0 if above else y + height + 2, label, mask, dark=rng.random() < 0.5)
    thing.partner, text.partner = text, thing
    return [thing, text]


def _label_mask(rng: random.Random, text: str, scale: float, face: int | None = None) -> np.ndarray:
    face = rng.randrange(sprites.FACES) if face is None else face
    return sprites.word(text, face, round(rng.choice(LETTER_SIZES) * (1 + (scale - 1) / 2)))


def _write(canvas: Canvas, x: int, y: int, text: str, mask: np.ndarray, dark: bool, plate: bool = True) -> Item:
    """Write a word, light on dark or dark on light, on a plate of its own unless `plate` is false."""
    light, deep = canvas.rng.randint(220, 255), canvas.rng.randint(0, 40)
    height, width = mask.shape
    box = Box(x, y, x + width, y + height)
    if plate:
        canvas.fill(box, deep if dark else light)
    canvas.blend(x, y, np.full((1, 1, 3), light if dark else deep, np.uint8), mask)
    return Item("text", "number" if text.isdigit() else text, box, text=text)


def _chart(canvas: Canvas, scale: float) -> list[Item]:
    """Three to five bars of different colours and clearly different heights on a light panel."""
    rng = canvas.rng
    count = rng.choice((3, 3, 4, 5))
    bar, gap = round(rng.choice((14, 17, 20)) * scale), round(4 * scale)
    height = round(rng.choice((64, 80, 96)) * scale)
    box = canvas.free(count * (bar + gap) + 2 * gap, height)
    if box is None:
        return []
    canvas.take(box)
    canvas.fill(box, rng.choice((235, 245, 255)))
    base = box.y1 - 4
    canvas.fill(Box(box.x0 + 2, base, box.x1 - 2, base + 2), 60)
    colors = rng.sample([color for color in COLORS if color != "white"], count)
    heights = [round((height - 12) * share) for share in rng.sample(BAR_HEIGHTS, count)]
    bars = []
    for i, (color, tall) in enumerate(zip(colors, heights, strict=True)):
        left = box.x0 + gap + gap // 2 + i * (bar + gap)
        place = Box(left, base - tall, left + bar, base)
        canvas.fill(place, tuple(_paint(rng, color)[0, 0].tolist()))
        rank = "tallest" if tall == max(heights) else "shortest" if tall == min(heights) else ""
        bars.append(Item("bar", "bar", place, color=color, rank=rank))
    return [Item("panel", "chart", box), *bars]


def _document(canvas: Canvas, scale: float, count: int) -> list[Item]:
    """A sheet of `count` lines, each a word and a number, like a receipt."""
    rng = canvas.rng
    face = rng.randrange(sprites.FACES)
    numbers = [f"{n:02d}" for n in rng.sample(range(100), count)]
    texts = rng.sample(WORDS, count)
    words = [_label_mask(rng, text, scale, face) for text in texts]
    values = [_label_mask(rng, number, scale, face) for number in numbers]
    left, right = max(m.shape[1] for m in words), max(m.shape[1] for m in values)
    line = max(m.shape[0] for m in words + values) + rng.choice((0, 2, 4))
    gap = round(rng.choice((4, 10, 18)) * scale)
    box = canvas.free(left + right + gap + 6, line * count + 6)
    if box is None:
        return []
    canvas.take(box)
    canvas.fill(box, rng.choice((235, 248, 255)))
    items = [Item("panel", "document", box)]
    for i in range(count):
        y = box.y0 + 3 + i * line
        word = _write(canvas, box.x0 + 3, y, texts[i], words[i], dark=False, plate=False)
        value = _write(canvas, box.x1 - 3 - values[i].shape[1], y, numbers[i], values[i], dark=False, plate=False)
        word.partner, value.partner = value, word
        items += [word, value]
    return items


def _clutter(canvas: Canvas, scale: float) -> list[Item]:
    """A picture of a kind that is never asked about."""
    rng = canvas.rng
    name = rng.choice(CLUTTER)
    sprite = sprites.glyph(name, round(rng.choice(EXTENTS[:5]) * (1 + (scale - 1) / 2)))
    height, width = sprite.shape[:2]
    box = canvas.free(width, height)
    if box is None:
        return []
    canvas.take(box)
    canvas.blend(box.x0, box.y0, sprite[..., :3], sprite[..., 3])
    return [Item("clutter", name, box, alpha=sprite[..., 3])]


def _blob(canvas: Canvas, scale: float) -> None:
    """A bright patterned patch of the background: salient, and nothing to ask about. Later items may lie over it."""
    rng = canvas.rng
    side = round(rng.randint(40, 90) * scale)
    x, y = rng.randrange(canvas.size - side), rng.randrange(canvas.size - side)
    grid = np.arange(side)
    period = rng.choice((4, 6, 9))
    pattern = rng.choice(("checks", "stripes", "noise"))
    if pattern == "checks":
        on = ((grid[:, None] // period + grid[None] // period) % 2).astype(bool)
    elif pattern == "stripes":
        on = ((grid[:, None] + grid[None] * rng.choice((-1, 0, 1))) // period % 2).astype(bool)
    else:
        on = np.random.default_rng(rng.getrandbits(32)).random((side, side)) < 0.5
    first, second = (np.array([rng.randrange(256) for _ in range(3)], np.uint8) for _ in range(2))
    radius = np.hypot(grid[:, None] - side / 2, grid[None] - side / 2)
    alpha = (np.clip(side / 2 - radius, 0, 6) * (rng.choice((120, 180, 220)) / 6)).astype(np.uint8)
    canvas.blend(x, y, np.where(on[..., None], first, second), alpha)
