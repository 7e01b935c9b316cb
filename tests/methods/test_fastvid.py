"""FastVID by its card, its released code written by hand, and what it leaves of clips made for it."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from torch.nn.functional import cosine_similarity

from winnow.core.errors import UnsupportedError, WinnowError
from winnow.core.info import ModelInfo
from winnow.core.layout import Layout
from winnow.core.plan import Plan
from winnow.core.view import View
from winnow.methods.fastvid import FastVID, PooledFrames, ProbeAttention
from winnow.signals.vision import VisionAttention

from .stubs import STUBS

ROW = VisionAttention(query="auto")


def _noise(seed, *shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def _view(x, look=None, vectors=None, layout=None):
    """`x`: `[b, T, P, D]`."""
    b, t, p, _ = x.shape
    look = torch.rand(b, t * p, generator=torch.Generator().manual_seed(5)) if look is None else look
    signals = {ROW: look, ProbeAttention(): look}
    if vectors is not None:
        signals[PooledFrames()] = vectors
    return View.of(x.flatten(1, 2), signals, layout=layout or Layout.grid(1, p, t))


def _scenes(scenes=4, frames=8, places=24, d=32, noise=0.0, seed=0):
    """Frames that are repeated in a scene, and scenes that have nothing in common."""
    base = _noise(seed, scenes, 1, places, d).repeat(1, frames, 1, 1).flatten(0, 1)
    return (base + noise * _noise(seed + 1, *base.shape))[None]


def _segments(vectors, tau, least):
    alike = [float(cosine_similarity(a, b, dim=0)) for a, b in pairwise(vectors)]
    cuts = set(sorted(range(len(alike)), key=lambda i: alike[i])[: least - 1])
    cuts |= {i for i, value in enumerate(alike) if value < tau}
    bounds = [0, *(i + 1 for i in sorted(cuts)), len(vectors)]
    return [list(range(a, b)) for a, b in pairwise(bounds)]


def _density(x):
    """Density × distance to a denser token, of each token of a list."""
    far = torch.cdist(x, x) / x.shape[1] ** 0.5
    rho = [float((-own.sort().values[:4].square().mean()).exp()) for own in far]
    every = range(len(x))
    apart = [min([float(far[i, j]) for j in every if rho[j] > rho[i]], default=float(far.max())) for i in every]
    return [a * r for a, r in zip(apart, rho, strict=True)]


def _released(x, vectors, look, share, least=8, tau=0.9, d=0.4, p=4, beta=0.6):
    """The authors' code for LLaVA-OneVision, token by token: the indices, and each output as weights."""
    frames, places, _ = x.shape
    retain = int(places * share)
    salient = retain - int(retain * d)
    context = retain - salient
    outputs: dict[int, torch.Tensor] = {}

    def weights(*tokens):
        return torch.zeros(frames * places, dtype=x.dtype).index_add(
            0, torch.tensor(tokens), torch.ones(len(tokens), dtype=x.dtype)
        )

    left = []
    for t in range(frames):
        best = sorted(range(places), key=lambda n: -float(look[t, n]))[:salient]
        outputs |= {t * places + n: weights(t * places + n) for n in best}
        left.append([n for n in range(places) if n not in best])
    for own in _segments(vectors, tau, least):
        stands = [t for t in own if (own[-1] - t) % p == 0]
        each = context * len(own) // len(stands)
        for t in stands:
            score = _density(x[t, left[t]])
            chosen = [left[t][i] for i in sorted(range(len(left[t])), key=lambda i: -score[i])[:each]]
            around = own if len(own) > 1 and each > context else [t]
            members: dict[int, list[int]] = {n: [] for n in chosen}
            for s in around:
                for n in left[s] if chosen else ():
                    nearest = max(chosen, key=lambda c: float(cosine_similarity(x[t, c], x[s, n], dim=0)))
                    members[nearest].append(s * places + n)
            for n, tokens in members.items():
                w = max(beta, 1 / (len(tokens) + 1))
                outputs[t * places + n] = w * weights(t * places + n) + (1 - w) * weights(*tokens) / len(tokens)
    return sorted(outputs), torch.stack([outputs[i] for i in sorted(outputs)])


def _is_released(reduce):
    cases = ((12, 20, 0.3), (16, 30, 0.5), (9, 20, 0.25), (8, 25, 0.2))
    for seed, (frames, places, share) in enumerate(cases):
        x = _noise(seed, 1, -(-frames // 3), 1, 16).repeat_interleave(3, 1)[:, :frames]
        x = x + 0.7 * _noise(seed + 9, 1, frames, places, 16)
        vectors, look = x.mean(2) + 0.01, torch.rand(1, frames * places, generator=torch.Generator().manual_seed(seed))
        found = reduce(_view(x, look, vectors), f"{100 * share:g}%", 2 + seed).lane(0)
        at, rows = _released(x[0].double(), vectors[0], look[0].view(-1, places), share, least=2 + seed)
        assert found.representatives.tolist() == at
        assert torch.allclose(found.to_matrix(torch.float64), rows, atol=1e-6)


def _as_released(view, keep, segments):
    (method,) = Plan.of(f"fastvid:released,keep={keep},segments={segments}").methods
    return method.reduce(view)


@pytest.mark.system("fastvid", "exact")
def test_released_is_the_authors_code():
    _is_released(_as_released)


@pytest.mark.parametrize("stub", STUBS)
def test_the_code_fails_for_a_stub(stub):
    with pytest.raises(AssertionError):
        _is_released(lambda view, keep, segments: stub(view, 72))


@pytest.mark.system("fastvid", "exact")
def test_released_with_as_many_anchors_as_a_frame_alone():
    """One anchor of each frame, and three frames that share two: one is lost, and the frames are as if alone."""
    x = _scenes(3, 3, 20, noise=0.3)
    vectors, look = x.mean(2), torch.rand(1, 180, generator=torch.Generator().manual_seed(2))
    method = FastVID.as_released(keep="15%", segments=3, tau=-1.0, every=2)
    found = method.reduce(_view(x, look, vectors))
    at, rows = _released(x[0].double(), vectors[0], look[0].view(9, 20), 0.15, least=3, tau=-1, p=2)
    assert len(at) == 9 * 2 + 3 * 2
    assert found.representatives[0].tolist() == at
    assert torch.allclose(found.lane(0).to_matrix(torch.float64), rows, atol=1e-6)


def _anchors(found, view):
    """The outputs that are mixtures of several tokens, by frame."""
    mixed = (found.lane(0).to_matrix() > 0).sum(1) > 1
    frame = found.lane(0).representatives[mixed] // (view.n // int(view.layout.place[-1, 1] + 1))
    return frame.unique().tolist()


@pytest.mark.system("fastvid", "exact")
def test_cuts_lie_where_scenes_end_and_anchors_in_every_fourth_frame():
    """With flat attention the salient tokens are the first of each frame."""
    view = _view(_scenes(), torch.ones(1, 32 * 24))
    for settings in ({"segments": 4, "tau": -1.0}, {"segments": 1}):
        for keep, total in (("25%", 192), ("50%", 384), (100, 100)):
            found = FastVID(keep=keep, **settings).reduce(view)
            assert found.m == total
            assert found.ordered
            assert found.is_stochastic
            assert _anchors(found, view) == [3, 7, 11, 15, 19, 23, 27, 31]
            scene = torch.arange(32 * 24) // (8 * 24)
            at, token = found.lane(0).to_matrix().nonzero().T
            assert torch.equal(scene[found.representatives[0, at]], scene[token])


def test_the_check_of_cuts_fails_for_other_segments():
    view = _view(_scenes(), torch.ones(1, 32 * 24))
    assert _anchors(FastVID(segments=1, tau=-1.0).reduce(view), view) == [3, 7, 11, 15, 19, 23, 27, 31]
    assert _anchors(FastVID(segments=7, tau=-1.0).reduce(view), view) != [3, 7, 11, 15, 19, 23, 27, 31]
    at, token = FastVID(segments=1, tau=-1.0, keep="25%").reduce(view).lane(0).to_matrix().nonzero().T
    assert int(token.max()) // 192 == 3
    assert int((token // 192)[at == at.max()].min()) == 0  # one segment: the last anchor has tokens of the first scene


@pytest.mark.system("fastvid", "exact")
def test_count_is_exact_whatever_the_segments():
    for seed, (frames, places) in enumerate(((1, 40), (2, 9), (7, 13), (16, 6))):
        view = _view(_noise(seed, 2, frames, places, 8).cumsum(1))
        for keep in (1, 2, 3, frames, frames + 1, view.n // 3, view.n - 1, view.n, view.n + 5):
            for context, every, least in ((0.0, 4, 3), (0.4, 4, 3), (1.0, 4, 1), (0.5, 1, 9)):
                found = FastVID(keep=keep, context=context, every=every, segments=least).reduce(view)
                assert found.m == min(keep, view.n)
                assert found.counts is None
                kept = found.representatives
                assert (kept.diff(dim=1) > 0).all()
                assert found.is_stochastic


@pytest.mark.system("fastvid", "exact")
def test_released_keeps_no_more_than_its_share_and_no_less_than_what_is_salient():
    for share in (0.1, 0.2, 0.3):
        view = _view(_noise(3, 2, 20, 25, 16).cumsum(1) / 3, vectors=_noise(4, 2, 20, 8))
        retain = int(25 * share)
        found = FastVID.as_released(keep=f"{100 * share:g}%", tau=0.2).reduce(view)
        for count in found.counts or (found.m,):
            assert 20 * (retain - int(retain * 0.4)) <= count <= 20 * retain


@pytest.mark.system("fastvid", "exact")
def test_without_anchors_it_is_the_top_of_each_frame_and_everything_at_100():
    x, look = _noise(0, 1, 4, 10, 8), torch.rand(1, 40, generator=torch.Generator().manual_seed(1))
    found = FastVID(keep="30%", context=0.0).reduce(_view(x, look))
    want = (look.view(4, 10).topk(3).indices + 10 * torch.arange(4)[:, None]).flatten().sort().values
    assert found.is_selection
    assert found.index.tolist() == [want.tolist()]
    assert FastVID(keep="100%").reduce(_view(x, look)).index.tolist() == [list(range(40))]


@pytest.mark.system("fastvid", "exact")
def test_a_token_that_is_seen_is_kept():
    x = _scenes(1, 8, 24, noise=0.02)
    x[0, 4, 9] = 3 * _noise(7, 32)
    look = torch.rand(1, 8 * 24, generator=torch.Generator().manual_seed(3))
    seen = look.clone()
    seen[0, 4 * 24 + 9] = 2
    assert 4 * 24 + 9 in FastVID(keep="20%").reduce(_view(x, seen)).representatives[0].tolist()


@pytest.mark.system("fastvid", "exact")
@pytest.mark.parametrize(("apart", "found"), [(0.5, 10), (3.0, 0)])
def test_a_token_that_nobody_sees_is_an_anchor_unless_it_lies_too_far_for_any_density(apart, found):
    recalled = 0
    for seed in range(10):
        x = _scenes(1, 8, 40, noise=0.05, seed=seed)
        x[0, 7, 9] = x[0, 7].mean(0) + apart * _noise(seed + 99, 32)
        look = torch.rand(1, 320, generator=torch.Generator().manual_seed(seed))
        look[0, 7 * 40 + 9] = 0
        kept = FastVID(keep="20%", segments=1, tau=-1.0).reduce(_view(x, look)).representatives[0]
        recalled += 7 * 40 + 9 in kept.tolist()
    assert recalled == found


def _distances(x, outputs):
    """How far the tokens of each scene lie from the nearest output, on average: `[4]`."""
    return torch.cdist(x.flatten(0, 1), outputs).amin(1).view(4, -1).mean(1)


def _covers_better(reduce):
    """What a scene gains at least over the most attended tokens of each frame, at 10 %: of ten clips of four scenes."""
    gained = []
    for seed in range(10):
        x = _scenes(4, 8, 30, noise=0.1, seed=2 * seed)
        view = _view(x, torch.rand(1, 960, generator=torch.Generator().manual_seed(seed)) + _scenes_look(seed))
        ours, top = reduce(view), FastVID(keep="10%", context=0.0).reduce(view)
        far = (_distances(x[0], found.apply(view.tokens)[0]) for found in (top, ours))
        gained.append((next(far) - next(far)).min())
    return torch.stack(gained)


def _scenes_look(seed):
    """What stays the same from frame to frame is attended to alike."""
    base = torch.rand(4, 1, 30, generator=torch.Generator().manual_seed(seed + 50))
    return 10 * base.repeat(1, 8, 1).reshape(1, -1)


@pytest.mark.system("fastvid", "directional")
def test_anchors_cover_a_clip_better_than_what_is_seen_most():
    gained = _covers_better(FastVID(keep="10%", segments=4).reduce)
    assert (gained > 0).all(), gained


@pytest.mark.system("fastvid", "directional")
def test_anchors_have_a_smaller_coverage_radius_than_what_is_seen_most():
    for seed in range(10):
        x = _scenes(4, 8, 30, noise=0.1, seed=2 * seed)
        view = _view(x, torch.rand(1, 960, generator=torch.Generator().manual_seed(seed)) + _scenes_look(seed))
        radius = []
        for context in (0.4, 0.0):
            kept = FastVID(keep="10%", segments=4, context=context).reduce(view).representatives[0]
            radius.append(float(torch.cdist(view.tokens[0], view.tokens[0, kept]).amin(1).max()))
        assert radius[0] < radius[1]


@pytest.mark.parametrize("stub", STUBS)
def test_stubs_cover_no_better(stub):
    assert not (_covers_better(lambda view: stub(view, 96)) > 0).all()


def test_a_batch_is_its_items_and_half_precision_its_single():
    x = _noise(0, 3, 6, 12, 16)
    look = torch.rand(3, 72, generator=torch.Generator().manual_seed(1))
    for settings in ({}, {"remainder": "lost"}):
        method = FastVID(keep="30%", segments=3, **settings)
        found = method.reduce(_view(x, look))
        half = method.reduce(_view(x.bfloat16(), look))
        single = method.reduce(_view(x.bfloat16().float(), look))
        for i in range(3):
            alone = method.reduce(_view(x[i : i + 1], look[i : i + 1])).lane(0)
            assert torch.equal(found.lane(i).representatives, alone.representatives)
            assert torch.equal(found.lane(i).to_matrix(), alone.to_matrix())
            assert torch.equal(half.lane(i).to_matrix(), single.lane(i).to_matrix())


def test_broken_tokens_are_counted_not_kept_and_reach_nothing():
    x = _noise(0, 1, 4, 12, 8)
    x[0, 1, 3] = torch.nan
    x[0, 3, 0] = torch.inf
    look = torch.rand(1, 48, generator=torch.Generator().manual_seed(1))
    look[0, 15] = 5
    view = _view(x, look)
    found = FastVID(keep="40%", segments=1, tau=-1.0).reduce(view)
    assert int(view.notes["nan_scores"]) == 2
    assert not {15, 36} & set(found.representatives[0].tolist())
    assert found.apply(view.tokens).isfinite().all()


def test_equal_tokens_go_to_the_first():
    found = FastVID(keep=8, segments=1).reduce(_view(torch.ones(1, 2, 10, 4), torch.ones(1, 20)))
    assert found.representatives.tolist() == [[0, 1, 2, 10, 11, 12, 13, 14]]


def test_a_picture_is_one_frame_and_a_video_without_some_tokens_is_refused():
    view = _view(_noise(0, 1, 1, 24, 8))
    assert FastVID(keep=9).reduce(view).m == 9
    view = View(view.tokens, Layout.grid(6, 4, 2), torch.arange(0, 48, 2)[None], 48, {ROW: torch.rand(1, 24)})
    with pytest.raises(WinnowError, match=r"fastvid needs a token at each of 24 places of 2 frames"):
        FastVID(keep=9).reduce(view)


def test_settings_that_make_no_sense_and_models_without_the_head_are_refused():
    for settings in ({"every": 0}, {"segments": 0}, {"beta": 1.5}, {"context": -0.1}, {"remainder": "kept"}):
        with pytest.raises(WinnowError, match="fastvid"):
            FastVID(**settings)
    with pytest.raises(WinnowError, match="3 vectors of frames, and 4 frames"):
        FastVID.as_released(keep="50%").reduce(_view(_noise(0, 1, 4, 9, 8), vectors=_noise(1, 1, 3, 8)))
    (step,) = FastVID.as_released().bind(ModelInfo("SigLIP"))[1]
    for signal in step.needs:
        with pytest.raises(UnsupportedError, match=r"pooling head; use head=false"):
            signal.site(ModelInfo("SigLIP"))
