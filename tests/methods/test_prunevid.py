"""PruneVid by its card, its released code written by hand, and what it leaves of clips made for it."""

from __future__ import annotations

import pytest
import torch
import zoo
from torch.nn.functional import cosine_similarity

import winnow
from winnow.core.errors import WinnowError
from winnow.core.info import ModelInfo
from winnow.core.layout import Layout
from winnow.core.plan import Plan
from winnow.core.step import State
from winnow.core.view import View
from winnow.methods.prunevid import PruneVid
from winnow.signals.peaks import TextPeak

from .stubs import STUBS, scores

PEAK = TextPeak(3)


def _noise(seed, *shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def _view(x, score=None):
    """`x`: `[b, T, P, D]`."""
    _, t, p, _ = x.shape
    return View.of(x.flatten(1, 2), score, layout=Layout.grid(1, p, t))


def _merged(method, x):
    """What the first step makes of clips, and the group of each token."""
    action, state = method.merge(_view(x), State())
    return action.reduction, state


def _clip(seed, lengths, places=30, d=24, still=0.7):
    """Scenes in which a share of the places stands still, and the others are drawn anew in each frame."""
    frames = []
    for number, length in enumerate(lengths):
        base = _noise(100 * seed + number, places, d)
        moving = torch.arange(places) >= still * places
        for t in range(length):
            own = base + 0.05 * _noise(10 * seed + t, places, d)
            frames.append(
                torch.where(moving[:, None], base.mean(0) * 3 + _noise(seed + 7 * t + number, places, d), own)
            )
    return torch.stack(frames)[None]


def _peaks(x, clusters, near=7):
    """Centres by density, best first, and the cluster of each token."""
    far, every = torch.cdist(x, x) / x.shape[1] ** 0.5, range(len(x))
    rho = [float((-own.sort().values[:near].square().mean()).exp()) for own in far]
    apart = [min([float(far[i, j]) for j in every if rho[j] > rho[i]], default=float(far.max())) for i in every]
    centres = sorted(every, key=lambda i: -apart[i] * rho[i])[:clusters]
    owner = [centres.index(i) if i in centres else int(far[i, centres].argmin()) for i in every]
    return centres, owner


def _runs(labels):
    runs = [[0]]
    for i in range(1, len(labels)):
        if labels[i] == labels[i - 1]:
            runs[-1].append(i)
        else:
            runs.append([i])
    return runs


def _refined(labels):
    """The code's `refine_clusters`: runs shorter than the longest of their label are given away, from the left."""
    found = list(labels)
    for run in _runs(labels):
        longest = max(len(other) for other in _runs(labels) if labels[other[0]] == labels[run[0]])
        if len(run) < longest or longest == 1:
            for i in run:
                found[i] = -1
    while -1 in found:
        run = next(run for run in _runs(found) if found[run[0]] == -1)
        left = next((other for other in _runs(found) if other[-1] == run[0] - 1), [])
        right = next((other for other in _runs(found) if other[0] == run[-1] + 1), [])
        beside = right if len(right) > len(left) else left
        for i in run:
            found[i] = found[beside[0]] if beside else 0
    return found


def _released(x, temporal=0.25, tau=0.8, beta=0.5):
    """The authors' merging, token by token: outputs as (token that stands for it, tokens of which it is the mean).

    Also the sizes of the groups: of each segment what stands still, and what does not in each frame.
    """
    frames, places, _ = x.shape
    labels = _refined(_peaks(x.mean(1), int(frames * temporal))[1])
    outputs, sizes = [], []

    def spatial(features, tokens):
        count = len(features)
        if count <= 14:
            outputs.extend((own[0], own) for own in tokens)
            return count
        centres, owner = _peaks(features, int(count * beta))
        for number, centre in enumerate(centres):
            members = [token for i, own in enumerate(tokens) if owner[i] == number for token in own]
            outputs.append((tokens[centre][0], members))
        return len(centres)

    for own in _runs(labels):
        width, still = len(own), []
        for n in range(places):
            total = sum(float(cosine_similarity(x[s, n], x[t, n], dim=0)) for s in own for t in own)
            still += [n] if width > 1 and (total - width) / (width * (width - 1)) > tau else []
        moving = [n for n in range(places) if n not in still]
        means = x[own][:, still].mean(0)
        size = spatial(means, [[t * places + n for t in own] for n in still]) if still else 0
        sizes.append((size, [spatial(x[t, moving], [[t * places + n] for n in moving]) if moving else 0 for t in own]))
    return outputs, sizes


def _is_released(merge):
    for seed, lengths in enumerate(((5, 4, 7), (8, 8), (3, 6, 2, 5), (16,))):
        x = _clip(seed, lengths)
        found = merge(_view(x)).lane(0)
        outputs, _ = _released(x[0].double())
        assert found.representatives.tolist() == [anchor for anchor, _ in outputs]
        want = torch.zeros(len(outputs), found.n)
        for row, (_, members) in zip(want, outputs, strict=True):
            row[members] = 1 / len(members)
        assert torch.allclose(found.to_matrix(), want, atol=1e-6)


def _as_released(view):
    (method,) = Plan.of("prunevid:released").methods
    return method.merge(view, State())[0].reduction


@pytest.mark.system("prunevid", "exact")
def test_released_merging_is_the_authors_code():
    _is_released(_as_released)


@pytest.mark.parametrize("stub", STUBS)
def test_the_code_fails_for_a_stub(stub):
    with pytest.raises(AssertionError):
        _is_released(lambda view: stub(view, 200))


def _selected(score, sizes, alpha):
    """The authors' selection: of each group the best, so many as the share leaves."""
    kept, start = [], 0
    for still, moving in sizes:
        for size in (still, *moving):
            own = sorted(range(start, start + size), key=lambda i: -score[i])[: int(size * alpha)]
            kept += own
            start += size
    return sorted(kept)


def _is_released_selection(cut):
    for seed, lengths in enumerate(((5, 4, 7), (8, 8), (3, 6, 2, 5))):
        x = _clip(seed, lengths)
        _, sizes = _released(x[0].double())
        first, state = PruneVid.as_released().merge(_view(x), State())
        left = state.token["group"].gather(1, first.reduction.representatives)
        score = scores(seed, left.shape[1])
        tokens = first.reduction.apply(_view(x).tokens)
        view = View.of(tokens, {PEAK: score}, layout=Layout.sequence(left.shape[1]))
        for alpha in (0.0, 0.1, 0.4, 0.73, 1.0):
            assert cut(view, State(token={"group": left}), alpha) == _selected(score[0].tolist(), sizes, alpha)


@pytest.mark.system("prunevid", "exact")
def test_released_selection_is_the_authors_code():
    _is_released_selection(
        lambda view, state, alpha: PruneVid.as_released(alpha=alpha).cut(view, state, PEAK).lane(0).index.tolist()
    )


def test_the_selection_fails_for_one_that_knows_no_groups():
    with pytest.raises(AssertionError):
        _is_released_selection(
            lambda view, state, alpha: PruneVid.as_released(alpha=alpha).cut(view, State(), PEAK).lane(0).index.tolist()
        )


@pytest.mark.system("prunevid", "exact")
def test_a_still_video_becomes_one_frame():
    x = _noise(0, 1, 1, 20, 8).repeat(1, 8, 1, 1)
    found, _ = _merged(PruneVid(beta=1.0, temporal=0.01), x)
    assert found.representatives.tolist() == [list(range(20))]
    assert torch.allclose(found.apply(x.flatten(1, 2)), x[:, 0], atol=1e-6)


@pytest.mark.system("prunevid", "exact")
def test_what_a_moving_square_sweeps_is_all_that_does_not_stand_still():
    """A background of one feature for each place, and a square of another that passes over three places."""
    x = torch.eye(20, 21)[None].repeat(6, 1, 1)
    swept = [4, 5, 6]
    for t in range(6):
        x[t, swept[t % 3]] = torch.eye(21)[20]
    _, state = _merged(PruneVid(temporal=0.01, beta=1.0), x[None])
    group = state.token["group"][0].view(6, 20)
    moving = [n for n in range(20) if len(group[:, n].unique()) == 6]
    assert moving == swept
    assert all(len(group[:, n].unique()) == 1 for n in range(20) if n not in swept)


@pytest.mark.system("prunevid", "exact")
def test_it_is_the_identity_where_nothing_is_merged_or_left_out():
    method = PruneVid(tau=2.0, beta=1.0, alpha=1.0)
    x = _clip(0, (4, 4))
    found, state = _merged(method, x)
    assert found.is_selection
    assert found.ordered
    assert found.index.tolist() == [list(range(240))]
    view = _view(x, scores(0, 240))
    assert method.cut(view, state, PEAK).index.tolist() == [list(range(240))]
    (released,) = Plan.of("prunevid:released,tau=2.0,beta=1.0").methods
    shuffled = released.merge(_view(x), State())[0].reduction
    assert sorted(shuffled.index[0].tolist()) == list(range(240))
    assert not shuffled.ordered


@pytest.mark.system("prunevid", "exact")
def test_a_group_keeps_a_token_at_least():
    group = torch.tensor([[0] * 10 + [1] * 2 + [2]])
    view = View.of(_noise(0, 1, 13, 4), {PEAK: scores(1, 13)})
    for least, want in ((0, [4, 0, 0]), (1, [4, 1, 1]), (3, [4, 2, 1])):
        kept = PruneVid(least=least).cut(view, State(token={"group": group}), PEAK)
        assert group[0, kept.index[0]].bincount(minlength=3).tolist() == want


def _evidence(cut):
    """A square moves over a still background, in a colour that the text attends to; its share among what is left."""
    found = []
    for seed in range(10):
        x = _clip(seed, (8, 8))
        first, state = PruneVid().merge(_view(x), State())
        group = state.token["group"].gather(1, first.reduction.representatives)
        n = group.shape[1]
        evidence = torch.rand(1, n, generator=torch.Generator().manual_seed(seed)) < 0.1
        score = scores(seed, n) + evidence
        view = View.of(first.reduction.apply(_view(x).tokens), {PEAK: score}, layout=Layout.sequence(n))
        kept = cut(view, State(token={"group": group}), seed)
        found.append(float(evidence[0, kept].float().sum() / evidence.sum()))
    return torch.tensor(found)


def _by_question(view, state, seed, alpha=0.4):
    return PruneVid(alpha=alpha).cut(view, state, PEAK).index[0]


def _by_chance(view, state, seed, alpha=0.4):
    blind = View.of(view.tokens, {PEAK: scores(seed + 999, view.n)}, layout=view.layout)
    return PruneVid(alpha=alpha).cut(blind, state, PEAK).index[0]


@pytest.mark.system("prunevid", "directional")
def test_what_the_text_attends_to_is_kept_and_lost_where_scores_are_random():
    assert (_evidence(_by_question) > _evidence(_by_chance) + 0.3).all()


@pytest.mark.parametrize("stub", STUBS)
def test_stubs_lose_it(stub):
    blind = _evidence(lambda view, state, seed: stub(view, 2 * view.n // 5).index[0])
    assert not (blind > _evidence(_by_chance) + 0.3).all()


@pytest.mark.system("prunevid", "directional")
def test_still_scenes_become_fewer_tokens_than_moving_ones():
    counts = [_merged(PruneVid(), _clip(1, (8, 8), still=share))[0].m for share in (0.0, 0.5, 1.0)]
    assert counts[0] > counts[1] > counts[2]


def test_a_batch_is_its_items_and_half_precision_its_single():
    x = torch.cat([_clip(seed, (5, 4, 7)) for seed in range(3)])
    for order in ("raster", "density"):
        method = PruneVid(order=order)
        found, state = _merged(method, x)
        half, single = (_merged(method, y)[0] for y in (x.bfloat16(), x.bfloat16().float()))
        for i in range(3):
            alone, own = _merged(method, x[i : i + 1])
            assert torch.equal(found.lane(i).representatives, alone.lane(0).representatives)
            assert torch.equal(found.lane(i).to_matrix(), alone.lane(0).to_matrix())
            assert torch.equal(state.token["group"][i], own.token["group"][0])
            assert torch.equal(half.lane(i).to_matrix(), single.lane(i).to_matrix())
            assert alone.is_stochastic


def test_both_orders_are_the_same_outputs():
    x = _clip(2, (5, 4, 7))
    (raster, _), (density, _) = (_merged(PruneVid(order=order), x) for order in ("raster", "density"))
    assert raster.ordered
    assert not density.ordered
    order = density.representatives[0].argsort()
    assert torch.equal(raster.representatives[0], density.representatives[0, order])
    assert torch.equal(raster.lane(0).to_matrix(), density.lane(0).to_matrix()[order])


def test_broken_tokens_reach_nothing_of_a_large_group():
    x = _clip(3, (6, 6))
    x[0, 2, 3] = torch.nan
    x[0, 8, 29] = torch.inf
    view = _view(x)
    found = PruneVid().merge(view, State())[0].reduction
    assert int(view.notes["nan_scores"]) == 2
    gone = ~found.apply(view.tokens)[0].isfinite().all(-1)
    assert found.representatives[0][gone].tolist() in ([], [8 * 30 + 29], [2 * 30 + 3], [2 * 30 + 3, 8 * 30 + 29])


def test_a_picture_is_one_frame_and_a_video_without_some_tokens_is_refused():
    found, _ = _merged(PruneVid(), _noise(0, 1, 1, 30, 8))
    assert found.m == 15
    view = View(_noise(0, 1, 24, 8), Layout.grid(6, 4, 2), torch.arange(0, 48, 2)[None], 48)
    with pytest.raises(WinnowError, match=r"prunevid needs a token at each of 24 places of 2 frames"):
        PruneVid().merge(view, State())


def test_steps_are_where_the_paper_has_them():
    info = ModelInfo("LLaVA", depth=32, points=("projected", "layers", "kv"))
    _, (merge, cut, follow) = PruneVid().bind(info)
    assert [str(step.at) for step in (merge, cut, follow)] == ["projected", "layers[11]", "kv[11]"]
    assert cut.needs == (TextPeak(10),)
    assert follow.run(None, None).layers == tuple(range(11))
    assert len(PruneVid(cache=False).bind(info)[1]) == 2
    assert len(PruneVid().bind(ModelInfo("small", depth=1))[1]) == 1
    assert [str(step.at) for step in PruneVid().bind(ModelInfo("two", depth=2))[1]] == ["projected", "layers[1]"]


@pytest.mark.system("prunevid", "exact")
def test_layers_up_to_the_cut_keep_the_tokens_that_are_left_behind_it():
    model, (sample,) = zoo.model("qwen2_5_vl"), zoo.samples("qwen2_5_vl", ("3 W 6",))
    plan = "prunevid:small=3,layer=1"
    with winnow.compress(model, plan) as handle, torch.no_grad():
        output = model(**sample)
        held = [layer.store.slots[0][0].tolist() for layer in output.past_key_values.layers[:2]]
        (item,) = handle.last.items
    assert 0 < len(item.kept) < item.n_visual
    with winnow.compress(model, f"{plan},alpha=1.0") as handle, torch.no_grad():
        model(**sample)
        merged = handle.last.items[0].kept.tolist()
    # Layers count what they have read: text, merged tokens, text.
    ids = sample["input_ids"][0]
    start, text = int((ids == zoo.VIDEO).nonzero()[0]), int((ids != zoo.VIDEO).sum())
    behind = list(range(start + len(merged), text + len(merged)))
    want = [*range(start), *(start + merged.index(token) for token in item.kept.tolist()), *behind]
    assert held == [want, want]
    with winnow.compress(model, f"{plan},cache=false"), torch.no_grad():
        whole = model(**sample)
    assert torch.equal(whole.logits, output.logits)


def test_settings_that_make_no_sense_are_refused():
    for settings in ({"alpha": 1.5}, {"beta": -0.1}, {"least": -1}, {"tau": -2}, {"order": "time"}, {"layer": -1}):
        with pytest.raises(WinnowError, match="prunevid"):
            PruneVid(**settings)
    with pytest.raises(WinnowError):
        PruneVid(layer=40).bind(ModelInfo("LLaVA", depth=32))
