"""The charts of the report, as shapes: `report_draw` turns the same shapes into SVG and into a PNG.

Coordinates are pixels from the upper left. A shape's `ink` is the name of a colour, which a stylesheet or a palette
resolves, so that a chart can be light, dark or printed.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

MARKERS = ("circle", "square", "diamond", "up", "down", "hexagon", "plus", "cross")
DASHES = ((), (6, 3), (2, 3), (8, 3, 2, 3), (1, 3))
INKS = 8  # colours for curves; more curves repeat them with another line
TEXT, LINE_HEIGHT = 12.5, 15
LETTER = 6.9  # pixels of a letter of that size, about
MOST_LABELS = 22  # curves that can be labelled side by side before their names become a wall


@dataclass(frozen=True)
class Stroke:
    """A line through points; closed and filled when `fill` is true."""

    points: tuple[tuple[float, float], ...]
    ink: str
    width: float = 1.0
    dash: tuple[float, ...] = ()
    fill: bool = False
    curve: str = ""


@dataclass(frozen=True)
class Dot:
    """A marker, and what a pointer reads on it."""

    x: float
    y: float
    ink: str
    marker: str
    note: str = ""
    curve: str = ""
    size: float = 4.2


@dataclass(frozen=True)
class Words:
    """Text; `at` is start, middle or end. `turned` reads upwards."""

    x: float
    y: float
    text: str
    ink: str = "ink"
    at: str = "start"
    size: float = TEXT
    bold: bool = False
    turned: bool = False
    curve: str = ""


Shape = Stroke | Dot | Words


@dataclass(frozen=True)
class Mark:
    """A point of a curve with its interval; `note` is what a pointer reads on it."""

    x: float
    y: float
    low: float
    high: float
    note: str = ""


@dataclass(frozen=True)
class Curve:
    """The marks of a method or baseline in the order of x. `quiet` draws it as a baseline: grey and thin."""

    name: str
    marks: tuple[Mark, ...]
    number: int
    quiet: bool = False

    @property
    def ink(self) -> str:
        return f"q{self.number % 3}" if self.quiet else f"c{self.number % INKS}"

    @property
    def marker(self) -> str:
        return "ring" if self.quiet else MARKERS[self.number % len(MARKERS)]

    @property
    def dash(self) -> tuple[float, ...]:
        return DASHES[(self.number + 1 if self.quiet else self.number // INKS) % len(DASHES)]


@dataclass(frozen=True)
class Axis:
    """One axis: its title with the unit, its range, and where its ticks are."""

    title: str
    low: float
    high: float
    ticks: tuple[float, ...]
    log: bool = False
    unit: str = ""

    def share(self, value: float) -> float:
        """Where a value lies: 0 at the low end, 1 at the high end."""
        if self.log:
            return math.log(value / self.low) / math.log(self.high / self.low)
        return (value - self.low) / (self.high - self.low)


def axis(title: str, values: Sequence[float], *, unit: str = "", ends: tuple[float, float] | None = None) -> Axis:
    """An axis around values: logarithmic when they span more than a factor of four and are all positive.

    Args:
        ends: bounds that the range never leaves, such as 0 and 100 for percentages; they also make the axis linear.
    """
    low, high = min(values), max(values)
    if ends is None and low > 0 and high / low > 4:
        low, high = low / 1.08, high * 1.08
        coarse, fine = (
            tuple(t for e in range(-9, 13) for m in digits if low <= (t := m * 10.0**e) <= high)
            for digits in ((1, 2, 5), (1, 1.5, 2, 3, 4, 5, 7))
        )
        return Axis(title, low, high, coarse if len(coarse) > 3 else fine, True, unit)
    step = _step((high - low) or abs(high) or 1.0)
    low, high = math.floor(low / step - 1e-9) * step, math.ceil(high / step + 1e-9) * step
    if ends is not None:
        low, high = max(low, ends[0]), min(high, ends[1])
    if high - low < step:
        low, high = low - step, high + step
    count = round((high - low) / step)
    return Axis(title, low, high, tuple(round(low + i * step, 9) for i in range(count + 1)), False, unit)


def _step(span: float) -> float:
    """A step of 1, 2 or 5 times a power of ten that divides the span into four to nine parts."""
    rough = span / 6
    power = 10.0 ** math.floor(math.log10(rough))
    return next(m * power for m in (1, 2, 5, 10) if m * power >= rough * 0.999)


def number(value: float) -> str:
    """A tick or a table's number: no trailing zeros, thousands apart."""
    if value == int(value):
        return f"{int(value):,}".replace(",", "\u202f")
    return f"{value:.3g}"


def chart(
    curves: Sequence[Curve],
    x: Axis,
    y: Axis,
    *,
    size: tuple[int, int],
    level: tuple[float, str] | None = None,
    labels: bool = True,
    band: bool = False,
    aside: bool = False,
) -> list[Shape]:
    """Curves with their intervals.

    Args:
        size: width and height in pixels.
        level: a value of y to draw across as a reference, and its name, a line or two, for the right margin.
        labels: write the name of each curve beside its left end.
        band: draw the interval of curves that are not quiet as a band instead of bars, for charts of one method.
        aside: move the curves a few pixels apart, where many share their values of x, so that their bars can be seen.
    """
    frame = _Frame(curves, x, y, size, labels and len(curves) <= MOST_LABELS, level)
    if aside:
        frame.move_apart()
    shapes = frame.grid()
    if level is not None:
        at = frame.y(level[0])
        shapes.append(Stroke(((frame.left, at), (frame.right, at)), "level", 1.4, (5, 4)))
        shapes += [
            Words(frame.right + 5, at + 4 + LINE_HEIGHT * i, line, "level", size=11)
            for i, line in enumerate(level[1].split("\n"))
        ]
    for curve in sorted(curves, key=lambda c: not c.quiet):
        shapes += _curve(frame, curve, band)
    if frame.labelled:
        shapes += _labels(frame)
    return shapes


class _Frame:
    """Where the values of a chart lie in pixels."""

    def __init__(
        self,
        curves: Sequence[Curve],
        x: Axis,
        y: Axis,
        size: tuple[int, int],
        labelled: bool,
        level: tuple[float, str] | None,
    ) -> None:
        self.curves, self.axes, self.labelled = curves, (x, y), labelled
        self.width, self.height = size
        margin = 8 + 6.2 * max(map(len, level[1].split("\n"))) if level else 14.0
        self.left, self.right, self.top, self.bottom = 52.0, self.width - margin, 14.0, self.height - 48.0
        longest = max((len(curve.name) for curve in curves), default=0)
        self.room = min(self.width * 0.26, LETTER * longest + 30) if labelled else 12.0
        self.aside: dict[str, float] = {}

    def move_apart(self) -> None:
        loud = [curve.name for curve in self.curves if not curve.quiet]
        step = min(4.0, 30.0 / max(1, len(loud)))
        self.aside = {name: (i - (len(loud) - 1) / 2) * step for i, name in enumerate(loud)}

    def x(self, value: float, curve: str = "") -> float:
        start = self.left + self.room
        return start + self.axes[0].share(value) * (self.right - 18 - start) + self.aside.get(curve, 0.0)

    def y(self, value: float) -> float:
        return self.bottom - self.axes[1].share(value) * (self.bottom - self.top)

    def grid(self) -> list[Shape]:
        x, y = self.axes
        shapes: list[Shape] = []
        for tick in _thinned(y.ticks, max(2, int((self.bottom - self.top) / 34))):
            at = self.y(tick)
            shapes.append(Stroke(((self.left, at), (self.right, at)), "grid"))
            shapes.append(Words(self.left - 7, at + 4, number(tick) + y.unit, "muted", "end"))
        wide = 7.0 * max((len(number(tick) + x.unit) for tick in x.ticks), default=1) + 16
        for tick in _thinned(x.ticks, max(2, int((self.right - self.left - self.room) / wide))):
            at = self.x(tick)
            shapes.append(Stroke(((at, self.bottom), (at, self.bottom + 5)), "axis"))
            shapes.append(Words(at, self.bottom + 18, number(tick) + x.unit, "muted", "middle"))
        shapes.append(Stroke(((self.left, self.bottom), (self.right, self.bottom)), "axis"))
        shapes.append(Words((self.left + self.right) / 2, self.height - 9, x.title, "ink", "middle"))
        shapes.append(Words(13, (self.top + self.bottom) / 2, y.title, "ink", "middle", turned=True))
        return shapes


def _thinned(ticks: Sequence[float], most: int) -> Sequence[float]:
    """Every k-th tick, so that no more than `most` remain."""
    return ticks[:: max(1, math.ceil(len(ticks) / most))]


def _curve(frame: _Frame, curve: Curve, band: bool) -> list[Shape]:
    at = [(frame.x(m.x, curve.name), m) for m in curve.marks]
    shapes: list[Shape] = []
    if not curve.quiet and band and len(at) > 1:
        around = [(x, frame.y(m.high)) for x, m in at] + [(x, frame.y(m.low)) for x, m in reversed(at)]
        shapes.append(Stroke(tuple(around), curve.ink, fill=True, curve=curve.name))
    elif not curve.quiet:
        shapes += [Stroke(((x, frame.y(m.low)), (x, frame.y(m.high))), curve.ink, 1.1, curve=curve.name) for x, m in at]
    width, size = line_of(curve)
    line = tuple((x, frame.y(m.y)) for x, m in at)
    if len(line) > 1:
        shapes.append(Stroke(line, curve.ink, width, curve.dash, curve=curve.name))
    shapes += [Dot(x, frame.y(m.y), curve.ink, curve.marker, m.note, curve.name, size) for x, m in at]
    return shapes


def line_of(curve: Curve) -> tuple[float, float]:
    """The width of a curve's line and the size of its markers."""
    return (1.3, 2.6) if curve.quiet else (2.0, 4.2)


def _labels(frame: _Frame) -> list[Shape]:
    """The names of the curves in a column on the left, spread so that none covers another, each led to its curve."""
    drawn = [curve for curve in frame.curves if curve.marks]
    ends = [(frame.y(c.marks[0].y), frame.x(c.marks[0].x, c.name), c) for c in drawn]
    ends.sort(key=lambda end: (end[0], end[2].name))
    heights = spread([y for y, _, _ in ends], LINE_HEIGHT, frame.top + 6, frame.bottom - 6)
    right = frame.left + frame.room - 18
    shapes: list[Shape] = []
    for (y, x, curve), height in zip(ends, heights, strict=True):
        shapes.append(Stroke(((right + 3, height), (right + 9, height), (x - 5, y)), curve.ink, 0.6, curve=curve.name))
        fits = int((frame.room - 18) / LETTER)
        name = curve.name if len(curve.name) <= fits else curve.name[: fits - 1] + "…"
        shapes.append(Words(right, height + 4, name, curve.ink, "end", bold=not curve.quiet, curve=curve.name))
    return shapes


def spread(wanted: Sequence[float], apart: float, low: float, high: float) -> list[float]:
    """Ascending heights moved as little as needed to lie `apart` and inside low … high.

    Where they do not all fit, they are spaced equally.
    """
    if len(wanted) > 1 and (len(wanted) - 1) * apart > high - low:
        return [low + i * (high - low) / (len(wanted) - 1) for i in range(len(wanted))]

    def top(mean: float, count: int) -> float:
        tall = (count - 1) * apart
        return min(max(mean - tall / 2, low), high - tall)

    groups: list[tuple[float, int]] = []  # the mean of what its members want, and how many they are
    for height in wanted:
        mean, count = height, 1
        while groups and top(*groups[-1]) + groups[-1][1] * apart > top(mean, count):
            before, members = groups.pop()
            mean, count = (before * members + mean * count) / (members + count), members + count
        groups.append((mean, count))
    return [top(mean, count) + k * apart for mean, count in groups for k in range(count)]
