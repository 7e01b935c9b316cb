"""Shapes as SVG, whose colours a stylesheet sets, and the same shapes as a picture in light colours."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from itertools import groupby, pairwise

from PIL import Image, ImageColor, ImageDraw, ImageFont

from winnow.bench.report_chart import Dot, Shape, Stroke, Words
from winnow.bench.report_markup import Markup, el, join

# Inks c0 … c7 are for methods, q0 … q2 for baselines. Each is at least 3:1 against its paper; they differ in lightness
# as well as in hue, and every curve has a marker of its own besides.
LIGHT = {
    "paper": "#ffffff", "ink": "#1b1f24", "muted": "#59636e", "grid": "#e4e8ec", "axis": "#9aa4af", "level": "#59636e",
    "c0": "#0067b1", "c1": "#c94a00", "c2": "#00795a", "c3": "#b03a8b", "c4": "#8f6400", "c5": "#0a7f96",
    "c6": "#5b3fa8", "c7": "#9b1c31", "q0": "#6e7781", "q1": "#57606a", "q2": "#848d97",
}  # fmt: skip
DARK = {
    "paper": "#14171b", "ink": "#e9edf1", "muted": "#a0aab4", "grid": "#2a3037", "axis": "#5c6670", "level": "#a0aab4",
    "c0": "#5fb3f0", "c1": "#ff8a4c", "c2": "#3cc79a", "c3": "#f08bcb", "c4": "#e8b23a", "c5": "#4fd3e8",
    "c6": "#a99bff", "c7": "#ff7b86", "q0": "#939da7", "q1": "#b0b9c2", "q2": "#7d8790",
}  # fmt: skip
BAND = 0.18  # opacity of an interval drawn as a band
FINER = 2  # the picture is drawn this much larger, then made smaller: Pillow's lines have no smooth edges


def svg(shapes: Sequence[Shape], size: tuple[int, int], title: str, *, class_: str = "chart") -> Markup:
    """Inline SVG with a title for readers who cannot see it; the shapes of a curve are grouped under its name."""
    groups = []
    for curve, members in groupby(shapes, key=lambda shape: getattr(shape, "curve", "")):
        drawn = join(_svg_shape(shape) for shape in members)
        groups.append(el("g", drawn, data_curve=curve) if curve else drawn)
    return el(
        "svg",
        el("title", title),
        *groups,
        class_=class_,
        viewBox=f"0 0 {size[0]} {size[1]}",
        role="img",
        xmlns="http://www.w3.org/2000/svg",
    )


def _svg_shape(shape: Shape) -> Markup:
    if isinstance(shape, Stroke):
        points = " ".join(f"{x:.1f},{y:.1f}" for x, y in shape.points)
        if shape.fill:
            return el("polygon", points=points, class_=f"fill {shape.ink}", fill_opacity=BAND)
        dash = " ".join(map(str, shape.dash)) or None
        return el(
            "polyline", points=points, class_=f"line {shape.ink}", stroke_width=shape.width, stroke_dasharray=dash
        )
    if isinstance(shape, Words):
        turned = f"rotate(-90 {shape.x:.1f} {shape.y:.1f})" if shape.turned else None
        return el(
            "text",
            shape.text,
            x=f"{shape.x:.1f}",
            y=f"{shape.y:.1f}",
            class_=f"fill {shape.ink}",
            text_anchor=None if shape.at == "start" else shape.at,
            font_size=shape.size,
            font_weight="600" if shape.bold else None,
            transform=turned,
        )
    note = el("title", shape.note) if shape.note else None
    if shape.marker in ("circle", "ring"):
        where = {"cx": f"{shape.x:.1f}", "cy": f"{shape.y:.1f}", "r": shape.size}
        return el("circle", note, class_=f"{'hollow' if shape.marker == 'ring' else 'dot'} {shape.ink}", **where)
    corners = " ".join(f"{x:.1f},{y:.1f}" for x, y in outline(shape))
    return el("polygon", note, points=corners, class_=f"dot {shape.ink}")


def outline(dot: Dot) -> list[tuple[float, float]]:
    """The corners of a marker that is no circle."""
    s, t = dot.size * 1.25, dot.size * 0.45
    turns = {"square": (4, 45), "diamond": (4, 0), "up": (3, 0), "down": (3, 180), "hexagon": (6, 0)}
    if dot.marker in turns:
        count, start = turns[dot.marker]
        angles = (math.radians(start + 360 * i / count) for i in range(count))
        return [(dot.x + s * math.sin(a), dot.y - s * math.cos(a)) for a in angles]
    plus = [(-t, -s), (t, -s), (t, -t), (s, -t), (s, t), (t, t), (t, s), (-t, s), (-t, t), (-s, t), (-s, -t), (-t, -t)]
    if dot.marker == "cross":
        half = math.sqrt(0.5)
        plus = [((x - y) * half, (x + y) * half) for x, y in plus]
    return [(dot.x + x, dot.y + y) for x, y in plus]


def picture(shapes: Iterable[Shape], size: tuple[int, int], scale: float = 2.0) -> Image.Image:
    """The shapes on white paper, `scale` pixels to the unit."""
    fine = scale * FINER
    sheet = Image.new("RGB", (round(size[0] * fine), round(size[1] * fine)), LIGHT["paper"])
    pen = ImageDraw.Draw(sheet)
    for shape in shapes:
        color = ImageColor.getrgb(LIGHT[shape.ink])
        if isinstance(shape, Words):
            _write(sheet, pen, shape, color, fine)
        elif isinstance(shape, Dot):
            _dot(pen, shape, color, fine)
        elif shape.fill:
            veil = Image.new("L", sheet.size)
            ImageDraw.Draw(veil).polygon([(x * fine, y * fine) for x, y in shape.points], fill=round(255 * BAND))
            sheet.paste(color, mask=veil)
        else:
            for start, end in _dashes(shape.points, shape.dash):
                at = [(x * fine, y * fine) for x, y in (start, end)]
                pen.line(at, fill=color, width=max(1, round(shape.width * fine)))
    return sheet.resize((round(size[0] * scale), round(size[1] * scale)), Image.Resampling.LANCZOS)


def _dot(pen: ImageDraw.ImageDraw, dot: Dot, color: tuple[int, ...], fine: float) -> None:
    if dot.marker in ("circle", "ring"):
        around = [(c + sign * dot.size) * fine for sign in (-1, 1) for c in (dot.x, dot.y)]
        hollow = dot.marker == "ring"
        pen.ellipse(around, fill=LIGHT["paper"] if hollow else color, outline=color, width=round(1.3 * fine))
    else:
        pen.polygon([(x * fine, y * fine) for x, y in outline(dot)], fill=color)


def _write(sheet: Image.Image, pen: ImageDraw.ImageDraw, words: Words, color: tuple[int, ...], fine: float) -> None:
    font = ImageFont.load_default(words.size * fine)
    wide = pen.textlength(words.text, font)
    back = {"start": 0.0, "middle": wide / 2, "end": wide}[words.at]
    heavy = round(0.25 * fine) if words.bold else 0
    if not words.turned:
        at = (words.x * fine - back, words.y * fine)
        pen.text(at, words.text, fill=color, font=font, anchor="ls", stroke_width=heavy, stroke_fill=color)
        return
    high = round(words.size * fine * 1.4)
    veil = Image.new("L", (math.ceil(wide), high))
    ImageDraw.Draw(veil).text((0, round(words.size * fine)), words.text, fill=255, font=font, anchor="ls")
    veil = veil.rotate(90, expand=True)
    x, y = round(words.x * fine - words.size * fine), round(words.y * fine - wide + back)
    sheet.paste(color, (x, y, x + veil.width, y + veil.height), veil)


def _dashes(
    points: Sequence[tuple[float, float]], dash: Sequence[float]
) -> Iterable[tuple[tuple[float, float], tuple[float, float]]]:
    """The drawn pieces of a line; the pattern runs on over its corners."""
    pattern = list(dash) or [math.inf]
    which, left = 0, pattern[0]
    for (x0, y0), (x1, y1) in pairwise(points):
        length, done = math.hypot(x1 - x0, y1 - y0), 0.0
        while done < length:
            step = min(left, length - done)
            if which % 2 == 0:
                a, b = done / length, (done + step) / length
                yield (x0 + a * (x1 - x0), y0 + a * (y1 - y0)), (x0 + b * (x1 - x0), y0 + b * (y1 - y0))
            done, left = done + step, left - step
            if left <= 1e-9:
                which += 1
                left = pattern[which % len(pattern)]
