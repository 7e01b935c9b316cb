"""Tokens by frame and place: each where its layout says, also where frames differ or tokens are gone."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from winnow.core.errors import WinnowError
from winnow.core.layout import Layout, grid_rows
from winnow.core.view import View
from winnow.parts.frames import clip_of, frame_grid, frame_of, frame_slots, whole_clip
from winnow.testing import Picture

CPU = torch.device("cpu")
VIDEO = Layout.grid(2, 3, 4, newline=True)


def view_of(layout, b=2, seed=0):
    n = layout.n_content
    return View.of(torch.randn(b, n, 5, generator=torch.Generator().manual_seed(seed)), layout=layout)


def part(view, ids):
    """What is left of a view when these ids of each item stay."""
    ids = torch.tensor(ids)
    tokens = view.tokens.gather(1, ids[..., None].expand(-1, -1, view.tokens.shape[2]))
    return replace(view, tokens=tokens, ids=ids)


def test_each_token_lies_where_its_layout_says():
    view = view_of(VIDEO)
    clip = clip_of(view)
    assert clip.tokens.shape == (2, 4, 6, 5)
    assert clip.there.all()
    place = VIDEO.place[VIDEO.content]
    for j, (_, t, row, col) in enumerate(place.tolist()):
        assert torch.equal(clip.tokens[:, t, row * 3 + col], view.tokens[:, j])
    assert frame_of(view).tolist() == [place[:, 1].tolist()] * 2


def test_values_come_back_in_the_order_of_the_tokens():
    view = part(view_of(VIDEO), [[23, 0, 7], [4, 5, 20]])
    clip = clip_of(view)
    assert torch.equal(clip.of_tokens(clip.tokens[..., 0]), view.tokens[..., 0])
    assert frame_of(view).tolist() == [[3, 0, 1], [0, 0, 3]]


def test_places_of_tokens_that_are_gone_are_empty():
    view = part(view_of(VIDEO), [[1, 9], [9, 22]])
    clip = clip_of(view)
    assert clip.there.flatten(1).nonzero().tolist() == [[0, 1], [0, 9], [1, 9], [1, 22]]
    assert (clip.tokens[~clip.there] == 0).all()
    with pytest.raises(WinnowError, match=r"some needs .* 6 places of 4 frames, and the item has 2: an earlier method"):
        whole_clip(view, "some")
    assert torch.equal(whole_clip(view_of(VIDEO), "some").tokens, clip_of(view_of(VIDEO)).tokens)


@pytest.mark.parametrize("layout", [Layout.grid(3, 5), Layout.sequence(7), Picture.tiled(4, 2, 1).lm], ids=str)
def test_a_picture_is_one_frame_whatever_its_tiles(layout):
    view = view_of(layout)
    clip = whole_clip(view, "some")
    assert torch.equal(clip.tokens[:, 0], view.tokens)
    assert frame_of(view).eq(0).all()


def test_frames_that_stand_apart_are_numbered_without_gaps():
    rows = grid_rows(1, 2, 5)
    stay = np.isin(rows["place"][:, 1], (0, 3, 4))
    layout = Layout.of("apart", [{name: array[stay] for name, array in rows.items()}])
    assert frame_of(view_of(layout, b=1)).tolist() == [[0, 0, 1, 1, 2, 2]]


def test_frames_of_different_grids_have_the_places_of_all():
    """A frame at full size, and one that is pooled."""
    fine, coarse = grid_rows(2, 2), grid_rows(1, 1, grid=1)
    coarse["place"][:, 1] = 1
    layout = Layout.of("slow and fast", [fine, coarse])
    grid = frame_grid(layout, CPU)
    assert (grid.frames, grid.places, grid.full) == (2, 5, False)
    assert clip_of(view_of(layout)).there[0].tolist() == [[True] * 4 + [False], [False] * 4 + [True]]
    with pytest.raises(WinnowError, match="do not have the same places"):
        whole_clip(view_of(layout), "some")


def test_tokens_that_share_a_place_are_refused():
    layout = Layout.of("twice", [grid_rows(1, 2, 2), grid_rows(1, 2, 2)])
    with pytest.raises(WinnowError, match="share a place"):
        clip_of(view_of(layout))


def test_slots_of_a_picture_are_its_tokens_and_those_of_a_video_its_frames():
    tokens = torch.zeros(2, 12, 3)
    assert frame_slots(View.of(tokens, layout=Layout.grid(2, 3, 2)), "any")[0] == 2
    frames, slot = frame_slots(View.of(tokens, layout=Layout.grid(3, 4)), "any")
    assert (frames, slot.tolist()) == (1, [list(range(12))] * 2)
    fewer = View(tokens[:, :5], Layout.grid(3, 4), torch.arange(5).expand(2, -1), 12)
    assert frame_slots(fewer, "any")[1].tolist() == [list(range(5))] * 2
    with pytest.raises(WinnowError, match="any needs a token at each of 6 places of 2 frames"):
        frame_slots(replace(fewer, layout=Layout.grid(2, 3, 2)), "any")
