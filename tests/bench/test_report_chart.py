"""Charts: the geometry, the palette, and the two painters."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import ImageColor

from winnow.bench.report_chart import INKS, MARKERS, Curve, Dot, Mark, Stroke, Words, axis, chart, number, spread
from winnow.bench.report_draw import DARK, LIGHT, outline, picture, svg
from winnow.bench.report_markup import Markup, el, join


def curve(name: str, points: list[tuple[float, float]], at: int = 0, quiet: bool = False) -> Curve:
    return Curve(name, tuple(Mark(x, y, y - 3, y + 3, f"{name} {x}") for x, y in points), at, quiet)


@given(st.lists(st.floats(-50, 700), max_size=30))
def test_labels_never_overlap_and_stay_inside(wanted: list[float]) -> None:
    placed = spread(sorted(wanted), 15, 20, 600)
    assert len(placed) == len(wanted)
    assert all(20 - 1e-6 <= y <= 600 + 1e-6 for y in placed)
    assert all(b - a >= 15 - 1e-6 for a, b in itertools.pairwise(placed))


def test_labels_with_room_stay_where_they_belong_and_crowds_share_what_there_is() -> None:
    assert spread([30.0, 100.0, 400.0], 15, 20, 600) == [30.0, 100.0, 400.0]
    assert spread([100.0, 100.0], 15, 20, 600) == [92.5, 107.5]
    assert spread([1.0] * 5, 15, 20, 40) == [20.0, 25.0, 30.0, 35.0, 40.0]


@given(st.lists(st.floats(0.01, 1e6), min_size=1, max_size=8))
def test_an_axis_holds_its_values_and_has_a_few_ticks_in_its_range(values: list[float]) -> None:
    found = axis("x", values)
    assert all(-1e-9 <= found.share(v) <= 1 + 1e-9 for v in values)
    assert all(found.low - 1e-9 <= tick <= found.high * (1 + 1e-9) + 1e-9 for tick in found.ticks)
    assert 2 <= len(found.ticks) <= 31
    assert list(found.ticks) == sorted(set(found.ticks))


def test_percentages_stay_within_0_and_100_and_are_linear() -> None:
    found = axis("right", [1.0, 99.5], ends=(0.0, 100.0))
    assert (found.low, found.high, found.log) == (0.0, 100.0, False)
    assert axis("tokens", [28.0, 268.0]).log
    assert not axis("ms", [20.0, 42.0]).log


def test_a_chart_places_points_by_their_values_and_shows_axes_units_and_names() -> None:
    curves = [curve("a", [(16, 40), (64, 60)]), curve("b", [(16, 40), (64, 50)], 1), curve("base", [(16, 20)], 0, True)]
    x, y = axis("tokens", [16.0, 64.0]), axis("right, %", [17.0, 63.0], ends=(0.0, 100.0))
    shapes = chart(curves, x, y, size=(800, 500), level=(62.0, "full\n62.0"))
    dots = [s for s in shapes if isinstance(s, Dot)]
    a16, a64 = (d for d in dots if d.curve == "a")
    assert a16.x < a64.x
    assert a16.y > a64.y
    b16, _ = (d for d in dots if d.curve == "b")
    assert (b16.x, b16.y) == (a16.x, a16.y)
    assert (a16.y - a64.y) / 20 == pytest.approx((b16.y - [d for d in dots if d.curve == "b"][1].y) / 10)
    words = {s.text for s in shapes if isinstance(s, Words)}
    assert {"tokens", "right, %", "a", "b", "base", "full", "62.0"} <= words
    bars = [s for s in shapes if isinstance(s, Stroke) and len(s.points) == 2 and s.curve == "a" and s.width == 1.1]
    assert len(bars) == 2
    for s in shapes:
        for px, py in s.points if isinstance(s, Stroke) else ((s.x, s.y),):
            assert 0 <= px <= 800
            assert 0 <= py <= 500
    apart = chart(curves, x, y, size=(800, 500), aside=True)
    moved = {s.curve: s.x for s in apart if isinstance(s, Dot)}
    assert moved["a"] != moved["b"]


def test_long_names_are_cut_beside_the_curve_and_many_are_left_to_the_legend() -> None:
    x, y = axis("tokens", [16.0, 64.0]), axis("right, %", [17.0, 63.0], ends=(0.0, 100.0))
    plan = "fastervlm:keep=64 + fastv:layer=2,keep=50% + positions=compact"
    (name,) = (s for s in chart([curve(plan, [(16, 40)])], x, y, size=(880, 500)) if isinstance(s, Words) and s.curve)
    assert name.text.endswith("…")
    assert plan.startswith(name.text[:-1])
    many = chart([curve(str(i), [(16, 20 + i)], i) for i in range(40)], x, y, size=(880, 500))
    assert not [s for s in many if isinstance(s, Words) and s.curve]


def test_many_curves_have_no_two_alike() -> None:
    looks = {(c.ink, c.marker, c.dash) for c in (curve(str(i), [], i) for i in range(40))}
    assert len(looks) == 40
    assert len({curve(str(i), [], i, True).dash for i in range(5)}) == 5


def test_numbers_have_no_useless_digits() -> None:
    assert [number(v) for v in (50.0, 0.5, 12345.0, 2.5)] == ["50", "0.5", "12\u202f345", "2.5"]


def luminance(color: str) -> float:
    channels = [c / 255 for c in ImageColor.getrgb(color)]
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in channels]
    return float(np.dot(linear, (0.2126, 0.7152, 0.0722)))


@pytest.mark.parametrize("palette", [LIGHT, DARK], ids=["light", "dark"])
def test_every_ink_can_be_seen_on_its_paper(palette: dict[str, str]) -> None:
    for ink, color in palette.items():
        if ink in ("paper", "grid", "axis"):
            continue
        high, low = sorted((luminance(color), luminance(palette["paper"])), reverse=True)
        least = 4.5 if ink in ("ink", "muted") else 3.0
        assert (high + 0.05) / (low + 0.05) >= least, (ink, color)


# Machado, Oliveira and Fernandes (2009), severity 1: what people without red or without green cones see (linear RGB).
BLIND = {
    "protanopia": ((0.152286, 1.052583, -0.204868), (0.114503, 0.786281, 0.099216), (-0.003882, -0.048116, 1.051998)),
    "deuteranopia": ((0.367322, 0.860646, -0.227968), (0.280085, 0.672501, 0.047413), (-0.01182, 0.04294, 0.968881)),
}


@pytest.mark.parametrize("kind", BLIND)
@pytest.mark.parametrize("palette", [LIGHT, DARK], ids=["light", "dark"])
def test_neighbouring_colours_differ_also_for_the_colour_blind(palette: dict[str, str], kind: str) -> None:
    seen = []
    for i in range(INKS):
        rgb = np.array(ImageColor.getrgb(palette[f"c{i}"])) / 255
        linear = np.where(rgb <= 0.04045, rgb / 12.92, ((rgb + 0.055) / 1.055) ** 2.4)
        seen.append(_lab(np.clip(np.array(BLIND[kind]) @ linear, 0, 1)))
    distances = [math.dist(seen[i], seen[(i + 1) % INKS]) for i in range(INKS)]
    assert min(distances) > 12, distances


def _lab(linear: np.ndarray) -> tuple[float, ...]:
    matrix = ((0.4124564, 0.3575761, 0.1804375), (0.2126729, 0.7151522, 0.072175), (0.0193339, 0.119192, 0.9503041))
    x, y, z = (np.cbrt(v) if v > 0.008856 else 7.787 * v + 16 / 116
               for v in np.array(matrix) @ linear / (0.95047, 1, 1.08883))  # fmt: skip
    return 116 * y - 16, 500 * (x - y), 200 * (y - z)


def test_both_painters_draw_every_kind_of_shape() -> None:
    shapes = [Stroke(((5, 5), (95, 5)), "c0", 2, (6, 3)), Stroke(((10, 40), (40, 40), (40, 90)), "c1", fill=True)]
    shapes += [Dot(10 + 10 * i, 25, "c2", marker) for i, marker in enumerate((*MARKERS, "ring"))]
    shapes += [Words(50, 60, "a < b", "c3", "middle"), Words(90, 95, "up", "c4", turned=True, bold=True)]
    drawn = picture(shapes, (100, 100), 2)
    assert drawn.size == (200, 200)
    pixels = np.asarray(drawn)
    for box in ((0, 0, 200, 16), (20, 84, 70, 100), (10, 40, 200, 60), (60, 100, 140, 125), (160, 150, 190, 200)):
        left, top, right, bottom = box
        assert (pixels[top:bottom, left:right] < 230).any(), box
    markup = svg(shapes, (100, 100), "a & b")
    assert markup.count("<polygon") == 1 + len(MARKERS) - 1
    assert markup.count("<circle") == 2
    assert "a &lt; b" in markup
    assert "<title>a &amp; b</title>" in markup


def test_markers_are_centred_and_of_like_size() -> None:
    for marker in MARKERS[1:]:
        corners = np.array(outline(Dot(50, 50, "c0", marker)))
        assert abs(corners.mean(0) - 50).max() < 0.8, marker
        assert 3.5 < np.abs(corners - 50).max() < 6, marker


def test_children_and_attributes_are_escaped_unless_they_are_markup() -> None:
    assert el("p", "<b>", Markup("<i>"), title='"x"') == '<p title="&quot;x&quot;">&lt;b&gt;<i></p>'
    assert el("br") == "<br>"
    assert el("td", None, 3, hidden=True, lang=None, data_v=0) == '<td hidden data-v="0">3</td>'
    assert join(["<", Markup("<br>")], ", ") == "&lt;, <br>"
    assert Markup("<p>") + "<" == "<p>&lt;"
