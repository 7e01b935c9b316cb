"""A chart of a run: throughput, and the times to the first text and to the end, against the number of clients."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from winnow.bench.charts import LIGHT, Curve, Figure, drawing, number
from winnow.bench.intervals import Interval
from winnow.bench.svg import NO_METADATA
from winnow.core.errors import WinnowError
from winnow.serve.bench.figures import Row

SIZE = (15.0, 4.6)  # inches
FORMATS = (".svg", ".png")
TAIL = 99


def check_name(path: Path) -> None:
    """Refuse a file whose name says no format that is written."""
    if path.suffix.lower() not in FORMATS:
        raise WinnowError(f"--chart {path}: its name must end in {' or '.join(FORMATS)}.")


def write_chart(rows: Sequence[Row], path: Path) -> None:
    """Draw the figures of a run into a file."""
    drawn = chart(rows)
    path.parent.mkdir(parents=True, exist_ok=True)
    with drawing():
        drawn.savefig(path, facecolor=LIGHT["paper"], metadata=NO_METADATA if path.suffix == ".svg" else None)


def chart(rows: Sequence[Row]) -> Figure:
    """Three panels over the number of clients, a colour for each plan, with the intervals as bands."""
    plans = list(dict.fromkeys(row.plan for row in rows))
    with drawing() as make:
        figure = make(SIZE, layout="constrained")
        left, middle, right = figure.subplots(1, 3)
        for index, plan in enumerate(plans):
            own = [row for row in rows if row.plan == plan]
            curve = Curve(plan, (), max(0, index - 1), quiet=index == 0)
            _draw(left, own, [row.throughput for row in own], curve, plan)
            for ax, name in ((middle, "first"), (right, "total")):
                _draw(ax, own, [getattr(row, name)[50] for row in own], curve, plan)
                _draw(ax, own, [getattr(row, name)[TAIL] for row in own], curve)
        told = (
            (left, "answers in a second"),
            (middle, f"ms to the first text: p50, p{TAIL} dotted"),
            (right, f"ms to the end: p50, p{TAIL} dotted"),
        )
        for ax, title in told:
            _axes(ax, sorted({row.clients for row in rows}), title)
        for ax in (middle, right):
            ax.set_yscale("log")
            ax.yaxis.set_major_formatter(lambda value, _: number(value))
            ax.yaxis.set_minor_formatter("")
        left.set_ylim(bottom=0)
        left.legend(frameon=False)
        return figure


def _draw(ax: Any, rows: Sequence[Row], values: Sequence[Interval | None], curve: Curve, name: str = "") -> None:
    """A curve with its band, and without a name the dotted one of a tail."""
    known = [(row.clients, value) for row, value in zip(rows, values, strict=True) if value is not None]
    if not known:
        return
    x, y = [clients for clients, _ in known], [value.value for _, value in known]
    tail = {"ls": ":", "lw": 1.3} if not name else {"marker": curve.marker["marker"], "ms": 5}
    ax.plot(x, y, label=name or None, **curve.line | {"color": curve.color} | tail)
    if name and not any(math.isnan(value.low) for _, value in known):
        ax.fill_between(x, [v.low for _, v in known], [v.high for _, v in known], color=curve.color, alpha=0.18, lw=0)


def _axes(ax: Any, clients: Sequence[int], title: str) -> None:
    ax.set_xscale("log", base=2)
    ax.set_xticks(clients, [number(own) for own in clients])
    ax.set_xticks([], minor=True)
    ax.set_xlabel("clients")
    ax.set_title(title, size="medium")
    ax.grid(axis="y", color=LIGHT["grid"], lw=1)
    ax.set_axisbelow(True)
    ax.tick_params(labelcolor=LIGHT["muted"], color=LIGHT["axis"])
    for side, spine in ax.spines.items():
        spine.set_visible(side == "bottom")
        spine.set(color=LIGHT["axis"])
