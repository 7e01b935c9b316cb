"""Times and boxes as words: what is written is read back, whatever comes back is read."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from winnow.bench.grounding import overlap, recall_at_1
from winnow.core.errors import WinnowError
from winnow.parts.time_tokens import BoxTokens, TimeTokens, new_words, read_events, write_events

SECONDS = st.floats(0.01, 5000)
SHARE = st.floats(0, 1)
BINS = st.integers(2, 400)


def _bin_of_code(value, whole, bins):
    """As the authors' code makes bins."""
    return max(0, min(bins - 1, int(value / whole * (bins - 1))))


@pytest.mark.system("omnivid", "exact")
@given(SECONDS, SHARE, BINS)
def test_a_time_comes_back_within_half_a_bin_or_a_whole_one(duration, share, bins):
    t, width = share * duration, duration / (bins - 1)
    for rounding, most in (("nearest", 0.5), ("down", 1.0)):
        own = TimeTokens(bins, rounding)
        assert abs(t - own.value(own.of(t, duration), duration)) <= most * width * (1 + 1e-6)


@pytest.mark.system("omnivid", "exact")
def test_rounding_down_is_the_authors_and_may_be_off_by_more_than_half_a_bin():
    down, near = TimeTokens(100, "down"), TimeTokens(100)
    times = [i / 10 for i in range(1000)]
    assert [down.of(t, 100.0) for t in times] == [_bin_of_code(t, 100.0, 100) for t in times]
    off = [max(abs(t - own.value(own.of(t, 100.0), 100.0)) for t in times) for own in (near, down)]
    assert off[0] <= 0.5001 * 100 / 99 < off[1]


@pytest.mark.system("omnivid", "exact")
@given(SECONDS, SHARE, SHARE, BINS, st.sampled_from(("nearest", "down")))
def test_bins_are_monotone(duration, a, b, bins, rounding):
    own = TimeTokens(bins, rounding)
    first, second = sorted((a * duration, b * duration))
    assert own.of(first, duration) <= own.of(second, duration)


@pytest.mark.system("omnivid", "exact")
@given(SECONDS, SHARE, SHARE, st.integers(10, 300), st.sampled_from(("start-end", "center-duration")))
def test_a_moment_is_two_words_and_comes_back(duration, a, b, bins, form):
    start, end = sorted((a * duration, b * duration))
    own = TimeTokens(bins, form=form)
    words = own.encode(start, end, duration)
    assert len(words) == 2 < 8 <= len(f"{start:.1f} to {end:.1f}")  # of digits, a character is a token
    assert set(words) <= set(own.vocabulary)
    found = own.decode(" ".join(words), duration)
    width = duration / (bins - 1)
    more = 1 if len(set(words)) == 1 or a == b else 0  # an empty one begins a bin earlier
    assert abs(found[0] - start) <= (0.76 + more) * width + 0.01
    assert abs(found[1] - end) <= 0.76 * width + 0.01
    assert 0 <= found[0] <= found[1] <= round(duration, 2)


@pytest.mark.system("omnivid", "exact")
@given(st.tuples(*[SHARE] * 4), st.integers(2, 1000), st.integers(2, 1000))
def test_a_box_is_four_words_and_comes_back(shares, width, height):
    x, y = sorted(shares[:2]), sorted(shares[2:])
    box = (x[0] * width, y[0] * height, x[1] * width, y[1] * height)
    own = BoxTokens()
    words = own.encode(box, width, height)
    assert len(words) == 4
    assert set(words) <= set(own.vocabulary)
    found = own.decode(words, width, height)
    for got, want, whole in zip(found, box, (width, height) * 2, strict=True):
        assert abs(got - want) <= 0.501 * whole / 999


@pytest.mark.system("omnivid", "exact")
def test_moments_the_wrong_way_round_are_swapped_and_empty_ones_begin_a_bin_earlier():
    own = TimeTokens(11)
    assert own.decode("<time_bin_8> <time_bin_2>", 100.0) == (20.0, 80.0)
    assert own.decode("<time_bin_4> <time_bin_4>", 100.0) == (30.0, 40.0)
    assert own.decode("<time_bin_0> <time_bin_0>", 100.0) == (0.0, 0.0)
    assert own.decode("<time_bin_7> <time_bin_99>", 100.0) == (70.0, 100.0)
    assert own.decode("<time_bin_1> <time_bin_2>", 1.0) == (0.1, 0.2)
    centered = TimeTokens(11, form="center-duration")
    assert centered.decode("<time_bin_5> <time_bin_2>", 100.0) == (40.0, 60.0)
    assert centered.decode("<time_bin_9> <time_bin_6>", 100.0) == (60.0, 100.0)


MALFORMED = st.lists(
    st.sampled_from(
        ["<time_bin_3>", "<time_bin_", "<time_bin_99999999999999>", "<event>", "</event>", "a frog", "<box_7>", "", "<"]
    ),
    max_size=12,
)


@pytest.mark.system("omnivid", "exact")
@given(MALFORMED, SECONDS)
def test_malformed_answers_are_read_without_an_exception(parts, duration):
    text, own = " ".join(parts), TimeTokens()
    words = sum(part in ("<time_bin_3>", "<time_bin_99999999999999>") for part in parts)
    span = own.decode(text, duration)
    assert (span is None) == (words < 2)
    for start, end, _ in read_events(text, duration, own):
        assert 0 <= start <= end
    assert (BoxTokens().decode(text, 10, 10) is None) == (parts.count("<box_7>") < 4)


@pytest.mark.system("omnivid", "exact")
def test_events_are_written_and_read():
    own = TimeTokens(101)
    events = [(1.0, 4.0, "a frog enters"), (4.0, 9.0, "a ring changes")]
    text = write_events(events, 100.0, own)
    assert text.startswith("There are <counter_2> events in the given video. <event> <time_bin_1> <time_bin_4> a frog")
    assert read_events(text, 100.0, own) == events
    assert read_events(text.removesuffix(" </event>"), 100.0, own) == events
    broken = text.replace("<time_bin_4> a", "a", 1)
    assert [said for _, _, said in read_events(broken, 100.0, own)] == ["a ring changes"]
    assert set(text.replace(".", " ").split()) & set(new_words(own)) >= {"<counter_2>", "<event>", "<time_bin_9>"}
    with pytest.raises(WinnowError, match="count up to 30"):
        write_events(events * 16, 100.0, own)


def test_what_is_no_number_is_refused():
    for value, whole in ((float("nan"), 1.0), (1.0, 0.0), (1.0, -1.0), (1.0, float("inf"))):
        with pytest.raises(WinnowError, match="a finite number"):
            TimeTokens().of(value, whole)
    for bins, rounding, form in ((1, "nearest", "start-end"), (9, "up", "start-end"), (9, "down", "ends")):
        with pytest.raises(WinnowError, match="allowed"):
            TimeTokens(bins, rounding, form)


def test_overlap_in_time():
    assert overlap((0.0, 2.0), (1.0, 3.0)) == pytest.approx(1 / 3)
    assert overlap((0.0, 1.0), (2.0, 3.0)) == 0
    assert overlap((1.0, 2.0), (1.0, 2.0)) == 1
    assert overlap(None, (1.0, 2.0)) == 0
    assert overlap((1.0, 1.0), (1.0, 1.0)) == 1
    assert recall_at_1([(0.0, 2.0), None, (1.0, 2.0)], [(0.0, 3.0), (0.0, 1.0), (5.0, 6.0)], 0.5) == 1 / 3
