"""Budgets: what is refused (B1), what is clipped (B2), what rounds where."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from winnow.core.budget import Budget, split_evenly
from winnow.core.errors import WinnowError


@pytest.mark.parametrize(
    "value",
    [
        0,
        -1,
        -0.1,
        0.0,
        1.0,
        1.5,
        math.nan,
        math.inf,
        -math.inf,
        "abc",
        "",
        "-5",
        "150%",
        "0%",
        "0",
        "1.5",
        "½",
        True,
        None,
        [3],
        b"3",
    ],
    ids=repr,
)
def test_B1_bad_budget_names_what_is_allowed(value):
    with pytest.raises(WinnowError, match=r"allowed: an int ≥ 1 .*a float in \(0, 1\)"):
        Budget(value)


@pytest.mark.parametrize("value", [0, "0", 0.0, "0%"])
def test_B1_zero_needs_allow_empty(value):
    assert Budget(value, allow_empty=True).of(10) == 0
    with pytest.raises(WinnowError, match="allow_empty=True"):
        Budget(value)


@pytest.mark.parametrize("value", [True, math.nan, -1, 1.5, "x"])
def test_B1_allow_empty_allows_nothing_else(value):
    with pytest.raises(WinnowError):
        Budget(value, allow_empty=True)


def test_B1_one_point_nought_reads_as_both():
    with pytest.raises(WinnowError, match="Say 1 for one token or '100%' for all"):
        Budget(1.0)


@pytest.mark.parametrize(
    ("value", "n", "count"),
    [
        (64, 10, 10),
        (64, 64, 64),
        (1, 1, 1),
        (0.001, 100, 1),
        ("0.1%", 5, 1),
        (0.25, 1, 1),
        ("100%", 1, 1),
        ("100%", 7, 7),
    ],
)
def test_B2_never_more_than_there_are_and_never_none(value, n, count):
    assert Budget(value).of(n) == count


def test_B3_nothing_of_nothing():
    for value in (5, 0.5, "100%"):
        assert Budget(value).of(0) == 0


@pytest.mark.parametrize(
    ("value", "n", "nearest", "floor"),
    [
        (0.5, 5, 3, 2),
        (0.5, 7, 4, 3),
        ("50%", 576, 288, 288),
        ("29%", 50, 15, 14),  # 14.5, which is 14.499999999999998 in binary
        (0.29, 100, 29, 29),
        (0.1, 10, 1, 1),
        (0.125, 576, 72, 72),
        (0.098, 576, 56, 56),
        ("33.3%", 576, 192, 191),
        (0.249, 10, 2, 2),
        (0.999, 10, 10, 9),
    ],
)
def test_rounding(value, n, nearest, floor):
    assert Budget(value).of(n) == nearest
    assert Budget(value).of(n, rounding="floor") == floor


def test_of_a_view_is_of_its_tokens_at_entry():
    class At:
        entry = 40

    assert Budget("25%").of(At()) == 10


budgets = st.one_of(
    st.integers(1, 10_000),
    st.floats(1e-6, 1, exclude_max=True),
    st.integers(1, 10_000).map(str),
    st.integers(1, 100).map(lambda p: f"{p}%"),
)


@given(budgets, st.integers(1, 5000))
def test_count_is_within_bounds(value, n):
    for rounding in ("nearest", "floor"):
        assert 1 <= Budget(value).of(n, rounding=rounding) <= n


@given(st.integers(1, 100), st.integers(1, 2000))
def test_a_percentage_is_its_share(percent, n):
    if percent < 100:
        assert Budget(f"{percent}%").of(n) == Budget(percent / 100).of(n)
    assert Budget(f"{percent}%").of(n, rounding="floor") == max(1, percent * n // 100)  # in whole numbers
    assert Budget(f"{percent}%").of(n) == max(1, (2 * percent * n + 100) // 200)


@given(st.integers(1, 500), st.data())
def test_counts_grow_with_the_budget(n, data):
    a, b = sorted(data.draw(st.lists(st.floats(1e-6, 1, exclude_max=True), min_size=2, max_size=2)))
    assert Budget(a).of(n) <= Budget(b).of(n)


@given(st.integers(1, 10_000))
def test_equal_budgets_are_equal_however_they_are_written(count):
    assert Budget(str(count)) == Budget(count) == Budget(f" {count} ")
    assert Budget(f"{count / 20_000:.6f}") == Budget(count / 20_000)


def test_strings_of_numbers_are_numbers():
    assert Budget("64") == Budget(64)
    assert Budget(".5") == Budget("0.5") == Budget(0.5)
    assert Budget(" 25% ") == Budget("25%")


@given(st.lists(st.integers(0, 30), min_size=1, max_size=8), st.data())
def test_split_evenly(sizes, data):
    total = data.draw(st.integers(0, sum(sizes)))
    share = split_evenly(total, sizes)
    assert sum(share) == total
    assert all(0 <= s <= size for s, size in zip(share, sizes, strict=True))
    room = [s for s, size in zip(share, sizes, strict=True) if s < size]
    if room:  # whoever has room has nearly the most that anyone has, and earlier ones have the rest
        assert max(share) - min(room) <= 1
        assert room == sorted(room, reverse=True)


def test_split_evenly_golden():
    assert split_evenly(145, [576] * 5) == (29,) * 5
    assert split_evenly(17, [9] * 5) == (4, 4, 3, 3, 3)
    assert split_evenly(12, [4, 3, 20]) == (4, 3, 5)
    with pytest.raises(WinnowError, match=r"4 tokens from groups of \(1, 2\)"):
        split_evenly(4, [1, 2])
