"""Budgets: what is refused (B1), what is clipped (B2), what rounds where."""

from __future__ import annotations

import decimal
import math
from fractions import Fraction

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
    assert Budget(value, rounding="floor").of(n) == floor


@pytest.mark.parametrize(
    ("rounding", "counts"),
    [("half-up", (13, 14, 1)), ("half-even", (12, 14, 1)), ("floor", (12, 13, 1)), ("ceil", (13, 14, 1))],
)
def test_rules_of_rounding(rounding, counts):
    """12.5 and 13.5 of 25 and 27; what would be none is one."""
    assert tuple(Budget(value, rounding=rounding).of(n) for value, n in ((0.5, 25), ("50%", 27), (0.01, 5))) == counts
    assert Budget(0.5).rounded(rounding) == Budget(0.5, rounding=rounding)


def test_an_unknown_rule_is_refused():
    with pytest.raises(WinnowError, match=r"rounding='nearest'; allowed: half-up, half-even, floor, ceil"):
        Budget(0.5, rounding="nearest")


def test_of_a_view_is_of_the_content_tokens_of_its_item():
    class At:
        n_visual = 40

    assert Budget("25%").of(At()) == 10


RULES = {
    "half-up": decimal.ROUND_HALF_UP,
    "half-even": decimal.ROUND_HALF_EVEN,
    "floor": decimal.ROUND_FLOOR,
    "ceil": decimal.ROUND_CEILING,
}


@given(st.decimals("0.000001", "0.999999", places=6), st.integers(1, 20_000), st.sampled_from(sorted(RULES)))
def test_a_share_is_the_decimal_that_was_typed(share, n, rounding):
    """As a number, as a string and as a percentage, it neither loses nor gains a token."""
    want = min(n, max(1, int((share * n).to_integral_value(RULES[rounding]))))
    for typed in (float(share), f"{share:f}", f"{100 * share:f}%"):
        assert Budget(typed, rounding=rounding).of(n) == want


@given(st.integers(1, 500), st.integers(1, 500), st.sampled_from(sorted(RULES)))
def test_where_a_share_is_a_whole_number_of_tokens_every_rule_gives_it(k, parts, rounding):
    """0.29 of 100 is 29, although the nearest binary number lies below it."""
    k, n = min(k, parts), 1000 * parts
    assert Budget(f"{100 * k / parts:.1f}%", rounding=rounding).of(1000) == max(1, round(1000 * k / parts))
    assert Budget(f"{k / 1000:.3f}", rounding=rounding).of(n) == k * parts


@given(st.decimals("0.0001", "0.9999", places=4), st.integers(1, 5000))
def test_the_exact_share(share, n):
    assert Budget(float(share)).share(n) == Fraction(share)
    assert Budget(max(1, n // 3)).share(n) == Fraction(max(1, n // 3), n)


def test_a_budget_is_parsed_once():
    budget = Budget("12.5%", rounding="floor")
    assert Budget.parse(budget) is budget
    assert Budget.parse("64") == Budget(64)


def test_a_question_mark_allows_nothing_to_be_kept():
    assert Budget("1%?").of(10) == 0
    assert Budget("0?").of(10) == 0
    assert str(Budget("1%?")) == "1%?"
    assert Budget(str(Budget(3, allow_empty=True))) == Budget(3, allow_empty=True)


budgets = st.one_of(
    st.integers(1, 10_000),
    st.floats(1e-6, 1, exclude_max=True),
    st.integers(1, 10_000).map(str),
    st.integers(1, 100).map(lambda p: f"{p}%"),
)


@given(budgets, st.integers(1, 5000))
def test_count_is_within_bounds(value, n):
    for rounding in RULES:
        assert 1 <= Budget(value, rounding=rounding).of(n) <= n


@given(st.integers(1, 100), st.integers(1, 2000))
def test_a_percentage_is_its_share(percent, n):
    if percent < 100:
        assert Budget(f"{percent}%").of(n) == Budget(percent / 100).of(n)
    assert Budget(f"{percent}%", rounding="floor").of(n) == max(1, percent * n // 100)  # in whole numbers
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
