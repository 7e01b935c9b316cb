"""OmniVid's connector by its card: a few queries read each clip, and no other; then all are joined."""

from __future__ import annotations

import pytest
import torch

from winnow.core.errors import WinnowError
from winnow.core.layout import Layout
from winnow.core.step import State
from winnow.core.view import View
from winnow.methods.omnivid import MOST, OmniVid
from winnow.parts.clip_queries import ClipQueries
from winnow.parts.learned import untrained

from .stubs import tokens

WIDTH = 16


def made(seed=0):
    return untrained(lambda: ClipQueries(WIDTH, 24, MOST, 2, 1, 4), seed)


def view_of(x, layout, module=None):
    view = View.of(x, layout=layout)
    object.__setattr__(view, "module", module or made())
    return view


def emitted(view, **settings):
    return OmniVid(**settings).emit(view, State())[0]


@pytest.mark.system("omnivid", "exact")
@pytest.mark.parametrize(("frames", "every", "queries"), [(5, 2, 4), (4, 1, 3), (3, 8, 2), (4, 3, 8)])
@torch.no_grad()
def test_each_clip_has_as_many_tokens_as_queries_and_they_are_of_its_own(frames, every, queries):
    view = view_of(tokens(0, frames * 6, WIDTH, 2), Layout.grid(2, 3, frames))
    emit = emitted(view, every=every, queries=queries)
    sizes = [6 * min(every, frames - first) for first in range(0, frames, every)]
    counts = [min(queries, size) for size in sizes]
    came = emit.provenance
    assert emit.tokens.shape == (2, sum(counts), WIDTH)
    assert came.is_stochastic
    clip = [c for c, k in enumerate(counts) for _ in range(k)]
    for j, c in enumerate(clip):
        own = set(range(sum(sizes[:c]), sum(sizes[: c + 1])))
        assert set(came.lane(0).sources(j).tolist()) == own
        assert int(came.representatives[0, j]) in own


def _reads_its_clip_alone(read):
    """What the queries of a clip attend to does not change with the other clips."""
    x, layout = tokens(1, 24, WIDTH), Layout.grid(2, 3, 4)
    other = x.clone()
    other[:, 12:] = tokens(2, 12, WIDTH)
    one, two = read(view_of(x, layout)), read(view_of(other, layout))
    assert torch.equal(one[0, :4], two[0, :4])
    assert (one[0, 4:] - two[0, 4:]).abs().max() > 1e-4


@pytest.mark.system("omnivid", "exact")
@torch.no_grad()
def test_a_clip_is_read_alone():
    _reads_its_clip_alone(lambda view: emitted(view).provenance.matrix)


def all_at_once(view):
    """One clip of all frames."""
    return emitted(view, every=4, queries=8).provenance.matrix


@torch.no_grad()
def test_that_fails_for_queries_that_read_all_at_once():
    with pytest.raises(AssertionError):
        _reads_its_clip_alone(all_at_once)


@pytest.mark.system("omnivid", "exact")
@torch.no_grad()
def test_tokens_know_of_the_other_clips_and_of_when_theirs_is():
    x, layout = tokens(1, 24, WIDTH), Layout.grid(2, 3, 4)
    plain = emitted(view_of(x, layout)).tokens
    other = x.clone()
    other[:, 12:] = tokens(2, 12, WIDTH)
    assert (emitted(view_of(other, layout)).tokens[:, :4] - plain[:, :4]).abs().max() > 1e-4
    turned = emitted(view_of(x.roll(12, 1), layout)).tokens
    assert (turned.roll(4, 1) - plain).abs().max() > 1e-4  # the same clips in another order


@pytest.mark.system("omnivid", "exact")
@torch.no_grad()
def test_the_first_queries_read_the_same_whatever_comes_behind_them():
    view = view_of(tokens(3, 36, WIDTH), Layout.grid(2, 3, 6))
    many = emitted(view, queries=8).provenance.matrix.unflatten(1, (3, 8))
    few = emitted(view, queries=3).provenance.matrix.unflatten(1, (3, 3))
    torch.testing.assert_close(few, many[:, :, :3])


@torch.no_grad()
def test_a_picture_is_one_clip_and_frames_that_lost_tokens_are_refused():
    view = view_of(tokens(4, 30, WIDTH), Layout.grid(5, 6))
    assert emitted(view, queries=5).tokens.shape[1] == 5
    assert set(emitted(view, queries=5).provenance.lane(0).sources(2).tolist()) == set(range(30))
    video = View.of(tokens(4, 10, WIDTH), layout=Layout.grid(2, 3, 2))
    with pytest.raises(WinnowError, match="an earlier method has removed some"):
        emitted(View(**{**vars(video), "module": made()}))


@torch.no_grad()
def test_broken_tokens_are_counted_and_not_read():
    x = tokens(5, 24, WIDTH)
    spoilt = x.clone()
    spoilt[0, 7] = torch.nan
    view = view_of(spoilt, Layout.grid(2, 3, 4))
    emit = emitted(view)
    assert int(view.notes["nan_scores"]) == 1
    assert emit.tokens.isfinite().all()
    assert (emit.provenance.matrix[0, :, 7] == 0).all()
    spoilt[0, 7] = torch.inf
    assert torch.equal(emitted(view_of(spoilt, Layout.grid(2, 3, 4))).tokens, emit.tokens)


def test_more_queries_than_are_trained_are_refused():
    for wrong in ({"queries": 0}, {"queries": MOST + 1}, {"every": 0}):
        with pytest.raises(WinnowError, match="omnivid"):
            OmniVid(**wrong)
