"""When what is left of a sound is heard, and the longest span of which nothing is left."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from winnow.core.errors import WinnowError
from winnow.core.layout import Layout
from winnow.core.ledger import ItemLedger
from winnow.core.reduction import Reduction
from winnow.core.sounds import longest_dropped, times_of

SOUND = Layout.sound(10, 0.04)


def select(*ids):
    return Reduction.select(torch.tensor(ids, dtype=torch.int64), 10)


@pytest.mark.parametrize(
    ("ids", "longest"),
    [
        (range(10), 0.0),
        ([0, 9], 8),  # in the middle
        ([7, 9], 7),  # at the start
        ([0, 1, 5], 4),  # at the end, longer than the three in the middle
        ([0, 2, 4, 6, 8], 1),
        ([], 10),
    ],
)
def test_the_longest_span_of_which_nothing_is_left(ids, longest):
    assert longest_dropped(select(*ids), SOUND) == pytest.approx(longest * 0.04)


def test_what_is_merged_is_not_dropped_and_is_heard_at_the_mean_of_its_sources():
    cluster = torch.tensor([0, 0, 0, 1, -1, -1, 1, 2, 2, 2])
    merged = Reduction.assign(cluster, torch.tensor([1, 1, 2, 1, 1, 1, 1, 1, 1, 1.0]), m=3)
    assert longest_dropped(merged, SOUND) == pytest.approx(0.08)
    middles = 0.04 * (np.arange(10) + 0.5)
    want = [(middles[0] + middles[1] + 2 * middles[2]) / 4, (middles[3] + middles[6]) / 2, middles[8]]
    assert times_of(merged, SOUND).tolist() == pytest.approx(want)
    assert times_of(select(1, 4), SOUND).tolist() == pytest.approx([0.06, 0.18])


def test_a_ledger_says_both_of_a_sound_and_neither_of_a_picture():
    first, then = select(0, 1, 5, 6, 7), Reduction.select(torch.tensor([0, 4]), 5)
    ledger = ItemLedger(
        0, "audio", SOUND, 10, [("projected", "m", first), ("layers[1]", "m", then)], torch.tensor([0, 7])
    )
    assert ledger.times().tolist() == pytest.approx([0.02, 0.3])
    assert ledger.longest_dropped() == pytest.approx(6 * 0.04)
    picture = ItemLedger(0, "image", Layout.grid(2, 5), 10, [("projected", "m", select(1))], torch.tensor([1]))
    for ask in (picture.times, picture.longest_dropped):
        with pytest.raises(WinnowError, match="only the tokens of a sound"):
            ask()


def test_a_sound_is_a_row_in_time():
    assert SOUND.seconds == pytest.approx(0.4)
    assert Layout.sound(10, 0.04) == SOUND
    assert Layout.sound(10, 0.02) != SOUND != Layout.grid(1, 10)
    assert SOUND.times[3].tolist() == pytest.approx([0.12, 0.16])
    assert np.flatnonzero(SOUND.covering([(0.45, 0, 0.75, 1)])).tolist() == [4, 5, 6, 7]
    assert SOUND.place[:, 3].tolist() == list(range(10))
