"""CenterCLIP by its card: medoids of segments from a fixed start, in order, and what they cover."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from winnow.core.errors import WinnowError
from winnow.core.info import ModelInfo
from winnow.core.layout import Layout
from winnow.core.step import State
from winnow.core.view import View
from winnow.methods.centerclip import CenterCLIP
from winnow.parts.medoids import k_medoids_naive
from winnow.testing import Picture

from .stubs import STUBS, ids, tokens

SIDE, T = 5, 12
P = SIDE * SIDE


def shown(x):
    """A view of clips of one length, each `[t, P, d]`."""
    return View.of(torch.stack([own.flatten(0, 1) for own in x]), layout=Layout.grid(SIDE, SIDE, len(x[0])))


def released(x, k, p=2.0, rounds=100, most=None):
    """What the code does with the tokens of one segment: distances below zero, its own one below all others."""
    far = torch.cdist(x, x, p=p)
    far = far - (far.max() if most is None else most) - 1
    far.diagonal().sub_(1)
    medoids = [int(x.double().norm(dim=-1).argmax())]
    while len(medoids) < k:
        medoids.append(int(far[medoids].min(0).values.argmax()))
    for _ in range(rounds):
        before, owner = medoids, far[medoids].argmin(0)
        mine = owner == torch.arange(k)[:, None]
        medoids = [int((far * own * own[:, None]).sum(1).argmin()) for own in mine]
        if float((x[medoids] - x[before]).double().norm(dim=-1).sum()) < 1e-6:
            break
    medoids = sorted(medoids)
    return medoids, far[medoids].argmin(0)


def by_the_first(x, k):
    """The same where ties go to the first."""
    far = torch.cdist(x.double(), x.double(), compute_mode="donot_use_mm_for_euclid_dist")
    return k_medoids_naive(far.tolist(), x.norm(dim=-1).tolist(), k)[0]


@pytest.mark.system("centerclip", "exact")
def test_by_default_ties_go_to_the_first():
    """Clusters of two are many; in the code rounding decides for one of both."""
    other = 0
    for seed in range(6):
        view = shown([tokens(seed, P, 16, 4)])
        found = ids(CenterCLIP(keep=2 * P, segments=1).reduce(view))
        assert found == by_the_first(view.tokens[0], 2 * P)
        other += found != ids(CenterCLIP.as_released(keep=2 * P, segments=1).reduce(view))
    assert other


def _as_in_the_code(reduce, segments=(6, 4, 3, 12, 1)):
    for seed, count in enumerate(segments):
        view = shown([tokens(seed, P, 16, T), tokens(seed + 50, P, 16, T)])
        reduction = reduce(view, count, 7)
        for lane in range(2):
            parts = view.tokens[lane].split(T // count * P)
            want = [i * len(part) + j for i, part in enumerate(parts) for j in released(part, 7)[0]]
            assert ids(reduction, lane) == want


@pytest.mark.system("centerclip", "exact")
def test_as_released_it_keeps_what_the_code_keeps():
    _as_in_the_code(lambda view, s, k: CenterCLIP.as_released(keep=s * k, segments=s).reduce(view))


@pytest.mark.parametrize("stub", STUBS)
def test_the_code_fails_for_a_stub(stub):
    with pytest.raises(AssertionError):
        _as_in_the_code(lambda view, s, k: stub(view, s * k))


@pytest.mark.system("centerclip", "exact")
@pytest.mark.parametrize(("metric", "p"), [("manhattan", 1.0), ("euclidean", 2.0)])
def test_the_distances_of_the_code(metric, p):
    x = tokens(3, 60, 12)
    found = CenterCLIP(keep=9, metric=metric, ties="rounding").reduce(View.of(x))
    assert ids(found) == released(x[0], 9, p)[0]
    unit = x / x.norm(dim=-1, keepdim=True)
    assert ids(CenterCLIP(keep=9, metric=metric, unit_length=True).reduce(View.of(x))) == ids(
        CenterCLIP(keep=9, metric=metric).reduce(View.of(unit))
    )


@pytest.mark.system("centerclip", "exact")
def test_means_of_the_clusters_of_the_code():
    x = tokens(4, 60, 12)
    reduction = CenterCLIP.as_released(keep=9, aggregation="mean").reduce(View.of(x))
    medoids, owner = released(x[0], 9)
    assert reduction.representatives[0].tolist() == medoids
    want = torch.stack([x[0, owner == c].mean(0) for c in range(9)])
    torch.testing.assert_close(reduction.apply(x)[0], want)


@pytest.mark.system("centerclip", "exact")
@pytest.mark.parametrize("form", ["medoids", "spectral"])
def test_everything_kept_is_the_identity_and_results_repeat(form):
    view = shown([tokens(0, P, 8, T)])
    assert ids(CenterCLIP(keep="100%", form=form).reduce(view)) == list(range(T * P))
    once, again = (CenterCLIP(keep="20%", form=form).reduce(view) for _ in range(2))
    assert torch.equal(once.index, again.index)
    assert (once.index.diff() > 0).all()
    assert once.m == T * P // 5


@pytest.mark.system("centerclip", "exact")
@pytest.mark.parametrize(("frames", "segments"), [(12, 5), (7, 3), (4, 9), (1, 6)])
def test_segments_are_as_equal_as_can_be(frames, segments):
    view = shown([tokens(0, P, 8, frames)])
    index = CenterCLIP(keep=23, segments=segments).reduce(view).index[0]
    count = min(segments, frames)
    ends = np.cumsum([frames // count + (i < frames % count) for i in range(count)]) * P
    own = np.bincount(np.searchsorted(ends, index.numpy(), side="right"), minlength=count)
    assert own.sum() == 23
    assert own.max() - own.min() <= 1


@pytest.mark.system("centerclip", "exact")
def test_spectral_clusters_are_things_and_not_balls():
    """Two rings around one centre are told apart, which k-medoids do not."""
    angle = torch.arange(24) / 24 * 2 * torch.pi
    ring = torch.stack([angle.cos(), angle.sin()], 1)
    view = View.of(torch.cat([ring, 4 * ring])[None])
    groups = {}
    for form in ("spectral", "medoids"):
        reduction = CenterCLIP(keep=2, form=form, sigma=0.4, aggregation="mean").reduce(view)
        groups[form] = {tuple(row.nonzero()[:, 0].tolist()) for row in reduction.to_matrix()[0]}
    assert groups["spectral"] == {tuple(range(24)), tuple(range(24, 48))}
    assert groups["medoids"] != groups["spectral"]


def _event(seed):
    """A scene with a little noise in four frames, and in one of them a token that is like no other."""
    x = tokens(seed, P, 16)[0] + 0.05 * tokens(seed + 10, P, 16, 4)
    frame, place = seed % 4, 7 * seed % P
    x[frame, place] = 6 * tokens(seed + 20, 1, 16)[0, 0] / 4
    return shown([x]), frame * P + place


def _keeps_the_event(reduce):
    """Of four frames as many tokens as one has: the event is always among them; at random it would be in a quarter."""
    kept = []
    for seed in range(20):
        view, event = _event(seed)
        kept.append(event in ids(reduce(view, P)))
    assert all(kept)


@pytest.mark.system("centerclip", "exact")
def test_an_event_of_one_frame_is_kept():
    _keeps_the_event(lambda view, k: CenterCLIP(keep=k, segments=1).reduce(view))


@pytest.mark.parametrize("stub", STUBS)
def test_an_event_is_lost_by_a_stub(stub):
    with pytest.raises(AssertionError):
        _keeps_the_event(stub)


def _covers(reduce):
    """The token farthest from all kept ones is nearer than for as many at random, which beat a block of a frame."""
    gaps = []
    for seed in range(20):
        view, _ = _event(seed)
        x, index = view.tokens[0], reduce(view, P).index[0]
        random = torch.randperm(4 * P, generator=torch.Generator().manual_seed(seed))[:P]
        own, other, block = (float(torch.cdist(x, x[i]).amin(1).max()) for i in (index, random, torch.arange(P)))
        gaps.append((other - own, block - own))
    gaps = np.array(gaps)
    assert (gaps.mean(0) > 2 * gaps.std(0, ddof=1) / len(gaps) ** 0.5).all()


@pytest.mark.system("centerclip", "directional")
def test_medoids_cover_more_than_random_tokens_and_than_one_frame():
    _covers(lambda view, k: CenterCLIP(keep=k, segments=1).reduce(view))


@pytest.mark.parametrize("stub", STUBS)
def test_covering_fails_for_a_stub(stub):
    with pytest.raises(AssertionError):
        _covers(stub)


# In the tower.


@pytest.mark.system("centerclip", "exact")
@pytest.mark.parametrize("cls", [True, False])
def test_in_the_tower_each_tile_keeps_its_medoids_and_its_cls(cls):
    info = ModelInfo(vision_depth=12, points=("blocks",))
    (step,) = CenterCLIP(keep=9, block=6).bind(info)[1]
    assert str(step.at) == "blocks[6]"
    x = tokens(0, P + cls, 16, 3)
    reduction = step.act(View.of(x, layout=Layout.grid(SIDE, SIDE, cls=cls)), State())[0].reduction
    for lane in range(3):
        want = [cls + i for i in by_the_first(x[lane, int(cls) :], 9)]
        assert ids(reduction, lane) == [*range(cls), *want]


def test_in_the_tower_a_budget_is_a_share_of_each_tile():
    assert CenterCLIP(block=3).at_budget(320, 2880).keep.of(576) == 64
    assert CenterCLIP().at_budget(320, 2880).keep.of(2880) == 320
    with pytest.raises(WinnowError, match="24"):
        CenterCLIP(block=24).bind(ModelInfo(vision_depth=24, points=("blocks",)))


def test_after_an_earlier_method_a_video_is_refused_and_a_picture_is_not():
    view = shown([tokens(0, P, 8, 4)])
    with pytest.raises(WinnowError, match="centerclip needs a token at each of 25 places of 4 frames"):
        CenterCLIP().reduce(View(view.tokens[:, 1:], view.layout, view.ids[:, 1:], 4 * P))
    layout, left = Picture.tiled(4, 2, 1).lm, torch.arange(0, 48, 2)[None]
    x = tokens(0, 24, 8)
    assert ids(CenterCLIP(keep=5).reduce(View(x, layout, left, 48))) == by_the_first(x[0], 5)


def test_broken_tokens_are_not_kept_and_go_into_no_mean():
    x = tokens(0, P, 8, 4)
    x[1, 3], x[2, 4, 0] = torch.nan, torch.inf
    view = shown([x])
    assert not {P + 3, 2 * P + 4} & set(ids(CenterCLIP(keep="30%").reduce(view)))
    assert int(view.notes["nan_scores"]) == 2
    mean = CenterCLIP(keep="30%", aggregation="mean").reduce(view)
    assert mean.apply(view.tokens).isfinite().all()
    assert mean.is_stochastic
    assert CenterCLIP(keep="100%").reduce(view).m == 4 * P


def test_a_batch_is_its_videos_and_half_precision_its_single():
    view = shown([tokens(i, P, 8, 6).bfloat16() for i in range(3)])
    for settings in ({}, {"form": "spectral"}, {"aggregation": "mean"}):
        whole = CenterCLIP(keep="20%", **settings).reduce(view)
        for lane in range(3):
            own = View.of(view.tokens[lane : lane + 1].float(), layout=view.layout)
            alone = CenterCLIP(keep="20%", **settings).reduce(own)
            assert torch.equal(whole.lane(lane).to_matrix(), alone.lane(0).to_matrix())


@pytest.mark.parametrize(
    "settings",
    [{"segments": 0}, {"form": "x"}, {"metric": "x"}, {"aggregation": "x"}, {"sigma": 0}, {"near": -1}, {"block": 0.5}],
)
def test_wrong_settings(settings):
    with pytest.raises(WinnowError, match="allowed"):
        CenterCLIP(**settings)
