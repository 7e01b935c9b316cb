"""Quicksviewer by its card: cubes that share out the video, borders at cuts, and where the gradient goes."""

from __future__ import annotations

import itertools
from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from winnow.core.errors import WinnowError
from winnow.core.info import ModelInfo
from winnow.core.layout import Layout
from winnow.core.reduction import Reduction
from winnow.core.step import Emit
from winnow.core.view import View
from winnow.methods.quicksviewer import Quicksviewer
from winnow.parts.condensed import parts_naive
from winnow.parts.cubes import CubeModule, hardened, number_of_cubes, starts_of, thumbnail_of
from winnow.parts.learned import untrained

from . import connectors
from .stubs import tokens

H, W, D = 3, 4, 16
P = H * W


def scenes(cuts, t, b=1, seed=0, noise=0.1):
    """Projected tokens of scenes that begin at `cuts`, with a little noise in every frame."""
    x = tokens(seed, t * P, D, b).unflatten(1, (t, P))
    first = [max(s for s in (0, *cuts) if s <= i) for i in range(t)]
    other = tokens(seed + 1, t * P, D, b).unflatten(1, (t, P))
    return View.of((x[:, first] + noise * other).flatten(1, 2), layout=Layout.grid(H, W, t))


def module(queries=3, seed=0):
    return untrained(lambda: CubeModule(D, queries), seed)


def learned(view, made=None, **settings) -> Emit:
    return Quicksviewer(**settings).read(replace(view, module=made or module(), notes={}))


def free(view, **settings) -> Reduction:
    return Quicksviewer(**{"borders": "diff-norm", "tokens": "mean", "queries": 3, **settings}).read(view)


def begins_of(found: Reduction, lane=0) -> list[int]:
    """The frames in which tokens of cubes stand."""
    return sorted(set(found.representatives[lane].div(P, rounding_mode="floor").tolist()))


def share_out(cubes, t, frames):
    """Every frame belongs to one cube, frames of a cube follow each other, and there are as many cubes as promised."""
    assert sorted(f for cube in cubes for f in cube) == list(range(t))
    assert all(cube == list(range(cube[0], cube[-1] + 1)) for cube in cubes)
    assert len(cubes) == (1 if t == 1 else min(t, max(round(t / frames) - 1, 1) + 1))


def cubes_of(found: Reduction, queries: int) -> list[list[int]]:
    """The frames from which each cube's tokens come."""
    read = found.to_matrix()[0] != 0
    thumbs = (found.m % queries) if queries <= found.m else 0
    rows = read[thumbs:].unflatten(0, (-1, queries)).any(1)
    return [sorted(set((row.nonzero()[:, 0] // P).tolist())) for row in rows]


@pytest.mark.system("quicksviewer", "exact")
@given(st.integers(1, 14), st.integers(1, 6), st.integers(0, 99), st.sampled_from(["learned", "diff-norm", "even"]))
def test_cubes_share_out_the_video_without_gap_or_overlap(t, frames, seed, borders):
    view = View.of(tokens(seed, t * P, D), layout=Layout.grid(H, W, t))
    for found in (
        learned(view, frames=frames, borders=borders).provenance,
        Quicksviewer(frames=frames, borders=borders, tokens="mean", queries=3).read(replace(view, module=module())),
    ):
        assert found.m == 3 * number_of_cubes(t, frames) + (t > 1)
        share_out(cubes_of(found, 3), t, frames)


@pytest.mark.parametrize("cubes", [[[0, 1], [3]], [[0, 1], [1, 2, 3]], [[0, 2], [1, 3]], [[0], [1], [2], [3]]])
def test_what_does_not_share_out_the_video_is_told(cubes):
    with pytest.raises(AssertionError):
        share_out(cubes, 4, 2)


@pytest.mark.system("quicksviewer", "exact")
@pytest.mark.parametrize(
    ("t", "frames", "cubes"), [(420, 5, 84), (16, 5, 3), (8, 2, 4), (5, 2, 2), (7, 1, 7), (2, 9, 2), (1, 5, 1)]
)
def test_how_many_cubes_there_are(t, frames, cubes):
    assert number_of_cubes(t, frames) == cubes


def finds_cuts(choose):
    """With as many borders as cuts, all cuts are borders."""
    for seed, cuts in enumerate([(3, 7, 8), (1, 2, 11), (5, 6, 7), (2, 9, 10)]):
        assert choose(scenes(cuts, 16, seed=seed)) == [0, *cuts]


@pytest.mark.system("quicksviewer", "exact")
def test_the_size_of_the_change_finds_all_cuts():
    finds_cuts(lambda view: begins_of(free(view, frames=4)))


@pytest.mark.parametrize(
    "stub", [lambda view: begins_of(free(view, frames=4, borders="even")), lambda view: [0, 1, 2, 3]]
)
def test_cuts_tell_a_stub(stub):
    with pytest.raises(AssertionError):
        finds_cuts(stub)


@pytest.mark.system("quicksviewer", "directional")
def test_more_cuts_are_borders_than_in_cubes_of_equal_length():
    """Three cuts and three borders in 16 frames: all, and of even cubes about 3 in 15."""
    hits, even = 0, 0
    generator = torch.Generator().manual_seed(0)
    for seed in range(40):
        cuts = (1 + torch.randperm(15, generator=generator)[:3]).sort().values.tolist()
        view = scenes(cuts, 16, seed=seed, noise=0.3)
        hits += len({*cuts} & {*begins_of(free(view, frames=4))})
        even += len({*cuts} & {*begins_of(free(view, frames=4, borders="even"))})
    assert hits == 120
    assert even <= 40


def means(view, t, starts):
    """The thumbnail, and the means of cubes over three parts of the picture, of one video."""
    x = view.tokens[0].unflatten(0, (t, H, W))
    parts = [tuple(torch.tensor(own).T) for own in parts_naive(3, H, W)]
    cubes = [
        x[s:e][:, rows, columns].mean((0, 1)) for s, e in itertools.pairwise([*starts, t]) for rows, columns in parts
    ]
    return torch.stack([x[starts].mean((0, 1, 2)), *cubes])


@pytest.mark.system("quicksviewer", "exact")
def test_free_of_training_tokens_are_means_over_parts_of_each_cube():
    view = scenes((3, 7, 8), 16)
    found = free(view, frames=4)
    torch.testing.assert_close(found.apply(view.tokens)[0], means(view, 16, [0, 3, 7, 8]))
    other = free(view, frames=4, borders="even").apply(view.tokens)[0]
    assert not torch.allclose(other, means(view, 16, [0, 3, 7, 8]), atol=0.1)


@pytest.mark.system("quicksviewer", "exact")
def test_the_thumbnail_alone_carries_the_gradient_to_the_scores():
    made, x = module(), scenes((3, 9), 12).tokens.unflatten(1, (12, P))
    begins = hardened(made.cubing(x.mean(2)), 2)
    pooled, place = thumbnail_of(P, 9, x.device), torch.zeros(1, P, 2)
    out, _ = made.reader(pooled, x, torch.zeros(x.shape[:3], dtype=torch.bool), place, begins, starts_of(begins, 3))
    weight = made.cubing.token.weight
    (thumb,) = torch.autograd.grad(out[:, :1].square().sum(), weight, retain_graph=True)
    assert thumb.abs().max() > 1e-6
    (rest,) = torch.autograd.grad(out[:, 1:].square().sum(), weight, allow_unused=True)
    assert rest is None or not rest.any()


def test_a_cube_reads_nothing_of_other_cubes():
    view = scenes((4,), 8)
    found = learned(view, frames=3)
    other = replace(view, tokens=view.tokens.clone())
    other.tokens[:, : 4 * P] += 0.3  # the same change at the cut
    moved = learned(other, frames=3)
    assert begins_of(found.provenance) == begins_of(moved.provenance)
    last = found.provenance.representatives[0] >= begins_of(found.provenance)[1] * P
    assert torch.equal(found.tokens[0, last], moved.tokens[0, last]) is (begins_of(found.provenance)[1] >= 4)
    assert not torch.equal(found.tokens[0, ~last], moved.tokens[0, ~last])


@pytest.mark.system("quicksviewer", "exact")
def test_tokens_stand_in_the_first_frame_of_their_cube_and_none_twice():
    found = free(scenes((3, 7, 8), 16), frames=4)
    place = found.representatives[0]
    assert place.tolist() == sorted(set(place.tolist()))
    assert place.div(P, rounding_mode="floor").tolist() == [0] * 4 + [3] * 3 + [7] * 3 + [8] * 3
    assert place[0] == 0


def test_pictures_are_one_cube_without_a_thumbnail_and_small_ones_have_fewer_tokens():
    for n, queries in ((12, 3), (2, 3), (1, 3)):
        view = View.of(tokens(0, n, D), layout=Layout.grid(1, n))
        assert learned(view).tokens.shape == (1, min(n, queries), D)
        assert free(view).m == min(n, queries)
    small = View.of(tokens(0, 8, D), layout=Layout.grid(1, 2, 4))
    assert learned(small, frames=1).tokens.shape == (1, 1 + 4, D)
    one = View.of(tokens(0, 4, D), layout=Layout.grid(1, 1, 4))
    assert learned(one, frames=2).tokens.shape == (1, 2, D)


def test_a_batch_is_its_items_and_half_precision_is_computed_in_full():
    view = scenes((3, 5), 9, b=3)
    whole = learned(view, frames=3)
    for i in range(3):
        alone = learned(View.of(view.tokens[i : i + 1], layout=view.layout), frames=3)
        assert torch.equal(alone.tokens[0], whole.tokens[i])
    half = replace(view, tokens=view.tokens.bfloat16())
    same = learned(replace(view, tokens=half.tokens.float()), frames=3)
    found = learned(half, frames=3)
    assert found.tokens.dtype == torch.bfloat16
    assert torch.equal(found.tokens, same.tokens.bfloat16())


def test_broken_tokens_are_counted_and_reach_nothing():
    view = scenes((3, 5), 9)
    view.tokens[0, [1, 40, 41]] = torch.nan
    spoilt = replace(view, module=module(), notes={})
    found = Quicksviewer(frames=3).read(spoilt)
    assert found.tokens.isfinite().all()
    assert int(spoilt.notes["nan_scores"]) == 3
    assert free(view, frames=3).apply(view.tokens).isfinite().all()


def test_videos_of_which_tokens_are_gone_are_refused_and_pictures_are_not():
    left = torch.arange(40)[None]
    view = View(tokens(0, 40, D), Layout.grid(H, W, 4), left, 48)
    with pytest.raises(WinnowError, match="before methods that remove"):
        learned(view)
    picture = View(tokens(0, 9, D), Layout.grid(H, W), left[:, :9], 12)
    assert learned(picture).tokens.shape == (1, 3, D)


def test_settings_and_weights_are_checked():
    for bad in ({"frames": 0}, {"queries": 0}, {"borders": "random"}, {"tokens": "max"}, {"pool": 0}):
        with pytest.raises(WinnowError):
            Quicksviewer(**bad)
    assert Quicksviewer(borders="diff-norm", tokens="mean").build(ModelInfo(width=D)) is None
    assert Quicksviewer(borders="even").build(ModelInfo(width=D)).reader.queries.shape == (64, D)
    with pytest.raises(WinnowError, match="trained for another model"):
        Quicksviewer().build(ModelInfo(width=D, fingerprint=lambda: "another"))


@pytest.mark.system("quicksviewer", "directional")
@pytest.mark.xdist_group("clips")
def test_trained_it_answers_more_about_clips_than_untrained():
    found = connectors.of_method("quicksviewer")
    assert found.tokens == 17
    assert found.over_untrained.low > 0
