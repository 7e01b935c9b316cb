"""The charts of the report as matplotlib figures; `svg` makes them part of the page."""

from __future__ import annotations

import io
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from winnow.core.errors import WinnowError

Figure = Any  # matplotlib's, which is imported only where something is drawn

# Inks c0 … c7 are for methods, q0 … q2 for baselines. Each is at least 3:1 against its paper; they differ in lightness
# as well as in hue, and every curve has a marker of its own besides.
LIGHT = {
    "paper": "#ffffff", "ink": "#1b1f24", "muted": "#59636e", "grid": "#e4e8ec", "axis": "#9aa4af",
    "c0": "#0067b1", "c1": "#c94a00", "c2": "#00795a", "c3": "#b03a8b", "c4": "#8f6400", "c5": "#0a7f96",
    "c6": "#5b3fa8", "c7": "#9b1c31", "q0": "#6e7781", "q1": "#57606a", "q2": "#848d97",
}  # fmt: skip
DARK = {
    "paper": "#14171b", "ink": "#e9edf1", "muted": "#a0aab4", "grid": "#2a3037", "axis": "#5c6670",
    "c0": "#5fb3f0", "c1": "#ff8a4c", "c2": "#3cc79a", "c3": "#f08bcb", "c4": "#e8b23a", "c5": "#4fd3e8",
    "c6": "#a99bff", "c7": "#ff7b86", "q0": "#939da7", "q1": "#b0b9c2", "q2": "#7d8790",
}  # fmt: skip
INKS = 8  # colours for curves; more curves repeat them with another line
MARKERS = "osD^vhPX"
DASHES: tuple[tuple[float, ...], ...] = ((), (6, 3), (2, 3), (8, 3, 2, 3), (1, 3))
TEXT, LETTER, LINE_HEIGHT = 12.5, 6.9, 15  # pixels: of the type, of a letter, and from one label to the next
MOST_LABELS = 22  # curves that can be labelled side by side before their names become a wall


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
    def color(self) -> str:
        return LIGHT[f"q{self.number % 3}" if self.quiet else f"c{self.number % INKS}"]

    @property
    def marker(self) -> dict[str, Any]:
        if self.quiet:
            return {"marker": "o", "ms": 5.2, "mfc": LIGHT["paper"], "mec": self.color, "mew": 1.3}
        shape = MARKERS[self.number % len(MARKERS)]
        size = {"D": 7.4, "h": 9.6, "P": 10, "X": 10}.get(shape, 8.4)
        return {"marker": shape, "ms": size, "mfc": self.color, "mec": LIGHT["paper"], "mew": 0.8}

    @property
    def line(self) -> dict[str, Any]:
        dash = DASHES[(self.number + 1 if self.quiet else self.number // INKS) % len(DASHES)]
        return {"color": self.color, "lw": 1.3 if self.quiet else 2.0, "ls": (0, dash) if dash else "-"}


@dataclass(frozen=True)
class Scale:
    """What the axes of all charts of a kind share, so that they can be compared.

    Attributes:
        level: a height to draw across as a reference, and its name for the right margin, a line or two.
    """

    title: str
    x: tuple[float, float]
    y: tuple[float, float]
    log: bool
    level: tuple[float, str] | None = None

    @classmethod
    def around(cls, title: str, curves: Sequence[Curve], level: tuple[float, str] | None) -> Scale:
        """Around all marks and the intervals of all but baselines; x is logarithmic above a factor of four."""
        across = [mark.x for curve in curves for mark in curve.marks]
        heights = [h for c in curves for m in c.marks for h in ((m.y,) if c.quiet else (m.low, m.high))]
        heights += [level[0]] if level else []
        low, high = min(across), max(across)
        log = low > 0 and high / low > 4
        if low == high:
            low, high = 0.9 * low, 1.1 * high or 1.0
        return cls(title, (low, high), (min(heights), max(heights)), log, level)

    def forward(self, x: float) -> float:
        return math.log10(x) if self.log else x

    def limits(self, before: float, between: float, behind: float) -> tuple[float, float]:
        """Ends of an axis that leaves pixels free before and behind its values, which take `between` pixels."""
        low, high = map(self.forward, self.x)
        each = (high - low) / between
        ends = low - each * before, high + each * behind
        return (10 ** ends[0], 10 ** ends[1]) if self.log else ends

    def ticks(self, most: int) -> list[float]:
        """At most `most` round values of x, as many as there are."""
        low, high = self.x
        if self.log:
            digits = ((1, 1.5, 2, 3, 4, 5, 7), (1, 2, 3, 5), (1, 2, 5), (1, 3), (1,))
            found = [[d * 10.0**e for e in range(-9, 13) for d in some] for some in digits]
        else:
            found = [list(_locator(most)(low, high))]
        inside = [[t for t in ticks if low <= t <= high] for ticks in found]
        fits = next((ticks for ticks in inside if len(ticks) <= most), inside[-1])
        return fits[:: max(1, math.ceil(len(fits) / most))]

    def heights(self, most: int) -> list[float]:
        """Round percentages that enclose all heights."""
        low, high = self.y
        if high - low < 2:
            low, high = max(0.0, low - 1), min(100.0, high + 1)
        ticks = (round(float(t), 6) for t in _locator(most)(low, high))
        return [t for t in ticks if 0 <= t <= 100]


def _locator(most: int) -> Callable[[float, float], Sequence[float]]:
    from matplotlib.ticker import MaxNLocator

    return MaxNLocator(most, steps=[1, 2, 5, 10]).tick_values


def number(value: float) -> str:
    """A tick or a figure of a table: no trailing zeros, thousands apart."""
    value = round(value, 9)
    return f"{int(value):,}".replace(",", "\u202f") if value == int(value) else f"{value:.3g}"


@contextmanager
def drawing() -> Iterator[Any]:
    """matplotlib's figures under settings of our own; the user's style files do not reach the report."""
    try:
        import matplotlib as mpl
        from matplotlib import figure
    except ImportError:
        raise WinnowError(
            "The report's charts need matplotlib, which is not installed: pip install 'tokenwinnow[bench]'."
        ) from None
    own: Any = {
        "svg.fonttype": "none", "svg.hashsalt": "winnow", "font.family": "DejaVu Sans", "font.size": TEXT,
        "text.color": LIGHT["ink"], "text.parse_math": False, "lines.scale_dashes": False,
    }  # fmt: skip
    with mpl.rc_context():
        mpl.rcdefaults()
        mpl.rcParams.update(own)
        yield figure.Figure


def require() -> None:
    """Raise WinnowError, with what to install, where charts cannot be drawn."""
    with drawing():
        pass


def chart(
    curves: Sequence[Curve],
    scale: Scale,
    size: tuple[int, int],
    *,
    labels: bool = True,
    band: bool = False,
    aside: bool = False,
) -> Figure:
    """Curves with their intervals, at 72 pixels to the inch.

    Args:
        size: width and height in pixels.
        labels: write the name of each curve beside its left end.
        band: draw the interval of curves that are not quiet as a band instead of bars, for charts of one method.
        aside: move the curves a few pixels apart, where many share their values of x, so that their bars can be seen.
    """
    with drawing() as make:
        wide, high = size
        figure = make((wide / 72, high / 72), dpi=72)
        figure.patch.set_gid("paper")
        margin = 8 + 6.2 * max(map(len, scale.level[1].split("\n"))) if scale.level else 14.0
        labels = labels and len(curves) <= MOST_LABELS
        longest = max((len(curve.name) for curve in curves), default=0)
        room = min(wide * 0.26, LETTER * longest + 30) if labels else 12.0
        across, up = wide - margin - 52, high - 62
        ax = figure.add_axes((52 / wide, 48 / high, across / wide, up / high))
        _axes(ax, scale, room + 22 * labels, across, up)
        loud = [curve.name for curve in curves if not curve.quiet]
        step = min(4.0, 30.0 / max(1, len(loud))) if aside else 0.0
        moved = {name: (i - (len(loud) - 1) / 2) * step for i, name in enumerate(loud)}
        for i, curve in enumerate(curves):
            _curve(ax, curve, i, moved.get(curve.name, 0.0), band)
        if labels:
            _labels(ax, curves, 52 + room - 18, moved)
        return figure


def _axes(ax: Any, scale: Scale, room: float, across: float, up: float) -> None:
    """Frame, ticks, grid and level."""
    if scale.log:
        ax.set_xscale("log")
    ax.set_xlim(scale.limits(room, across - room - 26, 26))
    heights = scale.heights(min(8, max(2, int(up / 34))))
    ax.set_ylim(heights[0], heights[-1])
    widest = 7.0 * max(len(number(t)) for t in scale.x) + 16
    ticks = scale.ticks(min(8, max(2, int((across - room) / widest))))
    for axis, values in ((ax.xaxis, ticks), (ax.yaxis, heights)):
        axis.set_ticks(values, [number(v) for v in values])
        axis.set_ticks([], minor=True)
    ax.tick_params(labelcolor=LIGHT["muted"], color=LIGHT["axis"], labelsize=TEXT, width=1)
    ax.tick_params("y", length=0, pad=7)
    ax.tick_params("x", length=5, pad=3)
    ax.grid(axis="y", color=LIGHT["grid"], lw=1)
    ax.set_axisbelow(True)
    ax.patch.set_visible(False)
    for side, spine in ax.spines.items():
        spine.set_visible(side == "bottom")
        spine.set(color=LIGHT["axis"], lw=1)
    ax.text(0.5, -39 / up, scale.title, transform=ax.transAxes, ha="center")
    ax.text(-36 / across, 0.5, "right answers, %", transform=ax.transAxes, ha="center", va="bottom",
            rotation=90, rotation_mode="anchor")  # fmt: skip
    if scale.level:
        height, name = scale.level
        ax.axhline(height, color=LIGHT["muted"], lw=1.4, ls=(0, (5, 4)))
        for i, line in enumerate(name.split("\n")):
            ax.annotate(line, (1, height), (5, -4 - LINE_HEIGHT * i), xycoords=("axes fraction", "data"),
                        textcoords="offset points", color=LIGHT["muted"], size=11)  # fmt: skip


def _curve(ax: Any, curve: Curve, index: int, aside: float, band: bool) -> None:
    from matplotlib.transforms import ScaledTranslation

    where = ax.transData + ScaledTranslation(aside / 72, 0, ax.figure.dpi_scale_trans)
    gid, order = f"curve {index}", 2.0 if curve.quiet else 3.0
    own: dict[str, Any] = {"transform": where, "gid": gid, "zorder": order}
    x, y, low, high = ([getattr(mark, name) for mark in curve.marks] for name in ("x", "y", "low", "high"))
    if band and not curve.quiet and len(x) > 1:
        ax.fill_between(x, low, high, color=curve.color, alpha=0.18, lw=0, **own)
    elif not curve.quiet:
        ax.vlines(x, low, high, color=curve.color, lw=1.1, **own)
    if len(x) > 1:
        ax.plot(x, y, clip_on=False, **curve.line, **own)
    for place, mark in enumerate(curve.marks):
        own["gid"] = f"{gid} {place}"
        ax.plot([mark.x], [mark.y], ls="", clip_on=False, **curve.marker, **own)


def _labels(ax: Any, curves: Sequence[Curve], right: float, aside: dict[str, float]) -> None:
    """The names of the curves in a column on the left, spread so that none covers another, each led to its curve."""
    from matplotlib.transforms import Affine2D

    pixels = Affine2D().scale(1 / 72) + ax.figure.dpi_scale_trans
    ends = []
    for index, curve in enumerate(curves):
        if curve.marks:
            x, y = ax.transData.transform((curve.marks[0].x, curve.marks[0].y))
            ends.append((y, curve.name, x + aside.get(curve.name, 0.0), index, curve))
    ends.sort()
    bottom, top = ax.bbox.ymin, ax.bbox.ymax
    fits = int((right - 52) / LETTER)
    for (y, name, x, index, curve), height in zip(
        ends, spread([end[0] for end in ends], LINE_HEIGHT, bottom + 6, top - 6), strict=True
    ):
        own = {"transform": pixels, "gid": f"curve {index}", "color": curve.color, "clip_on": False}
        ax.plot([right + 3, right + 9, x - 5], [height, height, y], lw=0.6, **own)
        shown = name if len(name) <= fits else name[: fits - 1] + "…"
        ax.text(right, height - 4, shown, ha="right", weight="normal" if curve.quiet else "bold", **own)


def spread(wanted: Sequence[float], apart: float, low: float, high: float) -> list[float]:
    """Ascending heights moved as little as needed to lie `apart` and inside low … high.

    Where they do not all fit, they are spaced equally.
    """
    if len(wanted) > 1 and (len(wanted) - 1) * apart > high - low:
        return [low + i * (high - low) / (len(wanted) - 1) for i in range(len(wanted))]

    def first(mean: float, count: int) -> float:
        tall = (count - 1) * apart
        return min(max(mean - tall / 2, low), high - tall)

    groups: list[tuple[float, int]] = []  # the mean of what its members want, and how many they are
    for height in wanted:
        mean, count = height, 1
        while groups and first(*groups[-1]) + groups[-1][1] * apart > first(mean, count):
            before, members = groups.pop()
            mean, count = (before * members + mean * count) / (members + count), members + count
        groups.append((mean, count))
    return [first(mean, count) + k * apart for mean, count in groups for k in range(count)]


def key(curve: Curve) -> Figure:
    """The line and the marker of a curve, for a legend."""
    with drawing() as make:
        figure = make((30 / 72, 14 / 72), dpi=72)
        figure.patch.set_gid("paper")
        ax = figure.add_axes((0, 0, 1, 1), xlim=(0, 30), ylim=(0, 14))
        ax.set_axis_off()
        ax.plot([1, 29], [7, 7], **curve.line)
        ax.plot([15], [7], ls="", **curve.marker)
        return figure


def png(figure: Figure) -> bytes:
    """The chart on white paper, two pixels to the unit."""
    buffer = io.BytesIO()
    with drawing():
        figure.savefig(buffer, format="png", dpi=144, facecolor=LIGHT["paper"], metadata={"Software": None})
    return buffer.getvalue()
