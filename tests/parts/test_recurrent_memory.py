"""Clips, groups of their frames, and the choice of clips."""

from __future__ import annotations

import torch
from hypothesis import given
from hypothesis import strategies as st

from winnow.parts.recurrent_memory import best_clips, clips_of, groups_of


@given(st.integers(1, 300), st.integers(1, 40))
def test_clips_share_out_the_video_about_equally(frames, each):
    clips = clips_of(frames, each)
    assert [f for start, end in clips for f in range(start, end)] == list(range(frames))
    lengths = [end - start for start, end in clips]
    assert max(lengths) <= each
    assert max(lengths) - min(lengths) <= 1
    assert len(clips) == -(-frames // each)


@given(st.integers(1, 20), st.data())
def test_groups_share_out_the_frames_of_a_clip(frames, data):
    groups = data.draw(st.integers(1, frames))
    share = groups_of(frames, groups)
    torch.testing.assert_close(share.sum(1), torch.ones(groups))
    assert ((share > 0).sum(0) == 1).all()
    first = (share > 0).float().argmax(1).tolist()
    assert first == [-(-i * frames // groups) for i in range(groups)]


def test_the_best_clips_stand_in_order_of_time():
    scores = torch.tensor([[0.1, 0.9, 0.3, 0.9, 0.2], [0.5, 0.5, 0.5, 0.5, 0.5]])
    assert best_clips(scores, 2, False).tolist() == [[1, 3], [0, 1]]
    assert best_clips(scores, 3, False).tolist() == [[1, 2, 3], [0, 1, 2]]
    assert best_clips(scores, 3, True).tolist() == [[1, 3, 4], [0, 1, 4]]
    assert best_clips(scores, 9, True).tolist() == [[0, 1, 2, 3, 4]] * 2
    scores[0, 1] = torch.nan
    assert best_clips(scores, 2, False)[0].tolist() == [2, 3]
