"""Charts: what is drawn where, the palette, and the two ways out."""

from __future__ import annotations

import io
import itertools
import math
import re
import sys
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image, ImageColor

from tests.bench import synthetic
from winnow.bench.charts import DARK, INKS, LIGHT, Curve, Mark, Scale, chart, key, number, png, spread
from winnow.bench.report import write_report
from winnow.bench.svg import SVG, XLINK, svg
from winnow.core.errors import WinnowError

SIZE = (800, 500)


def curve(name: str, points: list[tuple[float, float]], at: int = 0, quiet: bool = False) -> Curve:
    return Curve(name, tuple(Mark(x, y, y - 3, y + 3, f"{name} {x:g}") for x, y in points), at, quiet)


THREE = [
    curve("a & <b>", [(16, 40), (64, 60)]),
    curve("b", [(16, 40), (64, 50)], 1),
    curve("base", [(16, 20), (64, 30)], 0, True),
]


def parsed(text: str) -> ElementTree.Element:
    return ElementTree.fromstring(text)  # noqa: S314 - our own drawing


def drawn(curves: list[Curve], **options: bool) -> ElementTree.Element:
    scale = Scale.around("tokens", curves, (62.0, "full\n62.0"))
    return parsed(svg(chart(curves, scale, SIZE, **options), "p", "about", curves))


def marks(root: ElementTree.Element, name: str) -> list[tuple[float, float]]:
    """Where the markers of a curve are."""
    groups = [g for g in root.iter(f"{SVG}g") if g.get("data-curve") == name]
    return [(float(use.get("x", "")), float(use.get("y", ""))) for g in groups for use in g.iter(f"{SVG}use")]


def words(root: ElementTree.Element) -> list[str]:
    return ["".join(text.itertext()) for text in root.iter(f"{SVG}text")]


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


@given(st.lists(st.floats(0.01, 1e6), min_size=1, max_size=8), st.integers(2, 8))
def test_axes_hold_their_values_and_have_a_few_ticks_in_their_range(values: list[float], most: int) -> None:
    scale = Scale.around("x", [curve("c", [(value, 50.0) for value in values])], None)
    low, high = scale.limits(30, 600, 18)
    assert low < scale.x[0] <= min(values) <= max(values) <= scale.x[1] < high
    ticks = scale.ticks(most)
    assert all(low <= tick <= high for tick in ticks)
    assert ticks == sorted(set(ticks))
    assert len(ticks) <= most


@given(st.lists(st.floats(0, 100), min_size=1, max_size=8))
def test_percentages_stay_within_0_and_100(heights: list[float]) -> None:
    found = Scale.around("x", [curve("c", [(1.0, h) for h in heights], quiet=True)], None).heights(6)
    assert 0 <= found[0] <= min(heights) <= max(heights) <= found[-1] <= 100
    assert found == sorted(set(found))


def test_only_a_wide_range_is_logarithmic() -> None:
    assert Scale.around("tokens", [curve("c", [(28, 1), (268, 2)])], None).log
    assert not Scale.around("ms", [curve("c", [(20, 1), (42, 2)])], None).log


def test_a_chart_places_points_by_their_values_and_shows_axes_units_and_names() -> None:
    root = drawn(THREE)
    (ax, ay), (bx, by) = marks(root, "a & <b>")
    assert ax < bx
    assert ay > by
    first, second = marks(root, "b")
    assert first == (ax, ay)
    assert (ay - by) / 20 == pytest.approx((first[1] - second[1]) / 10, rel=1e-2)
    assert {"tokens", "right answers, %", "a & <b>", "b", "base", "full", "62.0"} <= set(words(root))
    for points in (marks(root, c.name) for c in THREE):
        assert all(52 <= x <= SIZE[0] and 0 <= y <= SIZE[1] - 48 for x, y in points)
    apart = drawn(THREE, aside=True)
    assert marks(apart, "a & <b>")[0] != marks(apart, "b")[0]


def test_bars_are_intervals_and_a_band_takes_their_place() -> None:
    groups = [g for g in drawn(THREE).iter(f"{SVG}g") if g.get("data-curve") == "b"]
    (bars,) = (
        [list(map(float, re.findall(r"[\d.]+", path.get("d", "")))) for path in g]
        for g in groups
        if len(g) == 2 and all("1.1" in path.get("style", "") for path in g)
    )
    (x16, y40), (x64, y50) = marks(drawn(THREE), "b")
    for (x0, low, x1, high), x, y in zip(bars, (x16, x64), (y40, y50), strict=True):
        assert x0 == x1 == pytest.approx(x, abs=0.1)
        assert low - y == pytest.approx(y - high, abs=0.2)
        assert low - high == pytest.approx(6 * (y40 - y50) / 10, rel=2e-2)
    assert "fill-opacity" in ElementTree.tostring(drawn(THREE, band=True), encoding="unicode")


def test_the_drawing_belongs_to_the_page_around_it() -> None:
    text = ElementTree.tostring(drawn(THREE), encoding="unicode")
    root = parsed(text)
    assert not re.search(r"#[0-9a-f]{6}|font-family|<\w*:?style|url\(|<metadata|http(?!://www\.w3\.org)", text)
    inks = set(re.findall(r"var\(--(\w+)\)", text))
    assert {"c0", "c1", "q0", "grid", "axis", "muted", "ink", "paper"} <= inks <= set(LIGHT)
    ids = [element.get("id") for element in root.iter() if element.get("id")]
    assert len(ids) == len(set(ids))
    assert all(ident.startswith("p-") for ident in ids)
    assert {(use.get(f"{XLINK}href") or "")[1:] for use in root.iter(f"{SVG}use")} == set(ids)
    inside = {id(path) for defs in root.iter(f"{SVG}defs") for path in defs.iter()}
    assert all(id(path) in inside for path in root.iter() if path.get("id"))  # or a marker is drawn at the corner too
    notes = [title.text for title in root.iter(f"{SVG}title")]
    assert notes[0] == "about"
    assert {"a & <b> 16", "a & <b> 64", "b 64", "base 16"} <= set(notes)
    scale = Scale.around("tokens", THREE, None)
    twice = [svg(chart(THREE, scale, SIZE), "p", "about", THREE) for _ in range(2)]
    assert twice[0] == twice[1]


def test_the_picture_is_on_white_paper_and_twice_as_large() -> None:
    with Image.open(io.BytesIO(png(chart(THREE, Scale.around("tokens", THREE, None), SIZE)))) as picture:
        assert picture.size == (1600, 1000)
        pixels = np.asarray(picture.convert("RGB"))
    assert (pixels[:20, -20:] == 255).all()
    seen = {tuple(color) for color in pixels.reshape(-1, 3)[::7].tolist()}
    assert {ImageColor.getrgb(LIGHT[ink]) for ink in ("c0", "c1")} <= seen


def test_a_key_shows_the_line_and_the_marker_of_its_curve() -> None:
    keys = [svg(key(curve(str(i), [], i)), f"k{i}", class_="key") for i in range(3)]
    for i, text in enumerate(keys):
        assert 'viewBox="0 0 30 14"' in text
        assert f"var(--c{i})" in text
        assert text.count("<use") == 1
        assert "aria-hidden" in text


def test_long_names_are_cut_beside_the_curve_and_many_are_left_to_the_legend() -> None:
    plan = "fastervlm:keep=64 + fastv:layer=2,keep=50% + positions=compact"
    (name,) = (text for text in words(drawn([curve(plan, [(16, 40)])])) if text.endswith("…"))
    assert plan.startswith(name[:-1])
    many = drawn([curve(f"curve-{i}", [(16, 20 + i)], i) for i in range(40)])
    assert not [text for text in words(many) if text.startswith("curve-")]


def test_many_curves_have_no_two_alike() -> None:
    looks = {str((c.color, c.marker, c.line)) for c in (curve(str(i), [], i) for i in range(40))}
    assert len(looks) == 40
    assert len({str(curve(str(i), [], i, True).line["ls"]) for i in range(5)}) == 5


def test_numbers_have_no_useless_digits() -> None:
    assert [number(v) for v in (50.0, 0.5, 12345.0, 2.5)] == ["50", "0.5", "12\u202f345", "2.5"]


@pytest.mark.parametrize("missing", ["matplotlib", "jinja2"])
def test_what_is_not_installed_is_named_with_the_extra_and_nothing_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, missing: str
) -> None:
    synthetic.accuracy(tmp_path / "runs.sqlite", questions=13, budgets=(64,), methods=("fastv",), pictures=0)
    monkeypatch.setitem(sys.modules, missing, None)
    with pytest.raises(WinnowError, match=rf"{missing}.*pip install 'tokenwinnow\[bench\]'"):
        write_report(tmp_path / "runs.sqlite", tmp_path / "r.html")
    assert not list(tmp_path.glob("r.*"))


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
