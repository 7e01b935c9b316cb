"""What is heard decides how many tokens of a video each window keeps: sums, bounds, and where the sound is."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from winnow.core.errors import WinnowError
from winnow.core.layout import Layout
from winnow.parts.audio_guided import guided_quotas, heard_in

TIMES = torch.from_numpy(Layout.sound(200, 0.04).times)  # 8 s: four windows of 2 s


def bang(seed=0, start=100, stop=150):
    """Attention that falls on the third window: 4 s to 6 s."""
    received = torch.rand(1, 200, generator=torch.Generator().manual_seed(seed))
    received[0, start:stop] += 1
    return received


def test_shares_say_where_the_most_attended_tokens_are():
    heard = heard_in(bang(), TIMES, windows=4, seconds=2.0, top=0.25)
    assert heard[0].tolist() == pytest.approx([0, 0, 1, 0])
    assert heard_in(bang(), TIMES, 4, 2.0, 1.0)[0].tolist() == pytest.approx([0.25] * 4)
    assert heard_in(bang(), TIMES, 2, 2.0, 0.25)[0].tolist() == pytest.approx([0, 1]), "sound behind the last window"
    broken = bang().index_fill(1, torch.arange(100, 150), torch.nan)
    assert heard_in(broken, TIMES, 4, 2.0, 0.25)[0, 2] == 0


def test_a_window_with_sound_keeps_more_and_the_total_is_exact():
    sizes = torch.full((1, 4), 64)
    quota = guided_quotas(heard_in(bang(), TIMES, 4, 2.0, 0.25), sizes, 64)
    assert quota.sum() == 64
    assert quota[0, 2] == quota.max() > 2 * quota[0, 0]
    assert quota[0, 0] == quota[0, 1] == quota[0, 3] > 0
    # By hand: ratios 1/4 · (0.5, 0.5, 4.5, 0.5) within 1 are 1/8, 1/8, 1, 1/8 of 64, scaled from 88 to 64.
    exact = [8 * 64 / 88, 8 * 64 / 88, 64 * 64 / 88, 8 * 64 / 88]
    assert all(abs(int(q) - x) < 1 for q, x in zip(quota[0], exact, strict=True))


def test_where_nothing_is_heard_windows_are_equal():
    quota = guided_quotas(torch.zeros(2, 4), torch.full((2, 4), 10), 20)
    assert quota.tolist() == [[5] * 4] * 2


@given(st.lists(st.floats(0, 1), min_size=1, max_size=8), st.data())
def test_the_total_is_met_within_what_each_window_has(heard, data):
    sizes = data.draw(st.lists(st.integers(1, 20), min_size=len(heard), max_size=len(heard)))
    total = data.draw(st.integers(1, sum(sizes)))
    quota = guided_quotas(torch.tensor([heard]), torch.tensor([sizes]), total)[0].tolist()
    assert sum(quota) == total
    assert all(0 <= q <= size for q, size in zip(quota, sizes, strict=True))


def test_what_makes_no_sense_is_refused():
    with pytest.raises(WinnowError, match="low"):
        guided_quotas(torch.zeros(1, 2), torch.ones(1, 2).long(), 1, low=0.5, high=0.1)
    for settings in ({"windows": 0}, {"seconds": 0.0}, {"top": 0.0}):
        with pytest.raises(WinnowError, match="heard_in"):
            heard_in(bang(), TIMES, **{"windows": 4, "seconds": 2.0, "top": 0.25, **settings})
