"""DART by its card: pivots by key norm, and what duplicates them least; as released, in the turns of a Python set."""

from __future__ import annotations

from functools import partial

import pytest
import torch
import zoo
from torch.nn.functional import cosine_similarity

from winnow.core.errors import WinnowError
from winnow.core.info import ModelInfo
from winnow.core.plan import Plan
from winnow.core.view import View
from winnow.methods.dart import DART
from winnow.testing import Build, Picture, check_on_models

from .stubs import STUBS, first_k, ids, scores, tokens
from .test_on_models import ROWS, by_hand

LLAVA = ModelInfo("LLaVA", depth=32, width=16, vision_depth=24, feature_layer=-2)


def _view(x, norms, text, states, method=None, layout=None):
    named = dict(zip((method or DART()).signals(), (norms, text, states), strict=True))
    return View.of(x, named, layout=layout)


def _random(seed, n, held=9, b=1):
    text = scores(seed + 1, held, b)
    text[:, :3] = -torch.inf  # a system prompt
    return tokens(seed, n, b=b), scores(seed + 2, n, b), text, tokens(seed + 3, held, b=b)


def _naive(x, norms, text, states, keep, image=4, words=4):
    """One item: pivots, then each pivot's least similar tokens, until `keep` are there."""
    n = len(x)
    pivots = sorted(range(n), key=lambda j: -norms[j])[: min(image, keep)]
    spoken = sorted((t for t in range(len(text)) if text[t] > -torch.inf), key=lambda t: -text[t])[:words]
    turns = [x[j] for j in pivots] + [states[t] for t in spoken]
    kept, rest = set(pivots), keep - len(pivots)
    for turn, pivot in enumerate(turns):
        alike = cosine_similarity(pivot[None], x, dim=1).tolist()
        count = rest // len(turns) + (turn < rest % len(turns))
        kept |= set(sorted((j for j in range(n) if j not in kept), key=lambda j: alike[j])[:count])
    return sorted(kept)


def _is_the_paper(reduce):
    for seed in range(5):
        given = _random(10 * seed, 40)
        for keep in (1, 3, 4, 5, 12, 21, 39):
            assert ids(reduce(_view(*given), keep)) == _naive(*(g[0] for g in given), keep)


@pytest.mark.system("dart", "exact")
def test_equals_the_paper_written_naively():
    _is_the_paper(lambda view, keep: DART(keep=keep).reduce(view))


@pytest.mark.parametrize("stub", STUBS)
def test_the_paper_fails_for_a_stub(stub):
    with pytest.raises(AssertionError):
        _is_the_paper(stub)


def _released(x, norms, text, states, keep, start):
    """The steps of the code on one prompt: a set of positions decides whose turn it is."""
    n = len(x)
    prompt = torch.cat([states[:start], x, states[start:]])
    image = (norms.topk(4).indices + start).tolist()
    words = text.topk(4).indices.tolist()
    chosen = set(image + words)
    valid = set(range(start, start + n)) - set(image)
    for pivot in list(chosen):
        pool = sorted(valid)
        far = -cosine_similarity(prompt[pivot], prompt[pool], dim=-1)
        best = [pool[i] for i in far.topk(keep // 8).indices]
        chosen.update(best)
        valid.difference_update(best)
    return sorted(j - start for j in chosen - set(words))


def _prompt(seed, n, start=35, after=20):
    """Image tokens, key norms, and what the row holds: states and text norms at their slots of the whole prompt."""
    x, norms, states = tokens(seed, n), scores(seed + 1, n), tokens(seed + 2, start + after)
    text = torch.full((1, start + n + after), -torch.inf)
    text[:, start + n :] = scores(seed + 3, after)
    row = torch.cat([states[:, :start], x, states[:, start:]], 1)
    return x, norms, text, row, states


@pytest.mark.system("dart", "exact")
@pytest.mark.parametrize(("n", "keep"), [(576, 128), (576, 64), (576, 192), (100, 33)])
def test_released_keeps_what_the_code_keeps(n, keep):
    (step,) = Plan.of(f"dart:released,keep={keep}").methods[0].bind(LLAVA)[1]
    differs = 0
    for seed in range(0, 60, 10):
        x, norms, text, row, states = _prompt(seed, n)
        values = dict(zip(step.needs, (norms, text, row, x), strict=True))
        found = ids(step.act(View.of(tokens(seed + 4, n), step.signals(values.__getitem__)), None)[0].reduction)
        assert str(step.at) == "layers[2]"
        assert len(found) == 4 + 8 * (keep // 8)
        assert found == _released(x[0], norms[0], text[0], states[0], keep, 35)
        by_norm = ids(DART(keep=keep, on_top=True).reduce(_view(x, norms, text, row)))
        differs += found != by_norm
    assert differs  # the turns matter


@pytest.mark.system("dart", "exact")
def test_no_duplicate_of_the_pivot_is_taken_while_others_remain():
    """Twenty copies of the pivot and ten other tokens: of these ten, none is left out."""
    x, norms, text, states = _random(3, 30)
    x[0, :20] = x[0, 0]
    norms[0, 0] = 9
    method = DART(keep=11, image_pivots=1, text_pivots=0)
    assert ids(method.reduce(_view(x, norms, text, states, method))) == [0, *range(20, 30)]


@pytest.mark.system("dart", "exact")
@pytest.mark.parametrize(("image", "words", "keep"), [(4, 4, 128), (1, 4, 41), (4, 0, 20), (0, 4, 20), (2, 1, 60)])
def test_on_top_counts_are_pivots_and_a_multiple_of_their_number(image, words, keep):
    method = DART(keep=keep, image_pivots=image, text_pivots=words, on_top=True)
    found = method.reduce(_view(*_random(1, 200, b=2)))
    assert found.counts is None
    assert found.m == image + (image + words) * (keep // (image + words))


def test_fewer_words_than_pivots_choose_again():
    x, norms, text, states = _random(7, 40)
    text[0, 1:] = -torch.inf
    text[0, 0] = 1
    found = ids(DART(keep=20).reduce(_view(x, norms, text, states)))
    again = torch.tensor([[4.0, 3.0, 2.0, 1.0]])
    assert found == ids(DART(keep=20).reduce(_view(x, norms, again, states[:, :1].expand(1, 4, -1))))
    assert found == ids(DART(keep=20).reduce(_view(x, norms, text[:, :2], states[:, :2])))


def test_positions_count_newlines_for_the_turns_of_the_code():
    layout = Picture.tiled(4, 2, 1).lm
    n = layout.n_content
    x, norms, text, row, _ = _prompt(2, n)
    method = DART(keep=16, start=3)
    image = norms[0].topk(4).indices
    at = [3 + int(layout.content[j]) for j in image] + text[0].topk(4).indices.tolist()
    turns = method._turns(_view(x, norms, text, row, method, layout), image[None], text.topk(4).indices)
    assert turns[0].tolist() == [at.index(place) for place in set(at)]


def test_a_broken_token_is_neither_pivot_nor_taken():
    x, norms, text, states = _random(4, 20)
    x[0, 3] = torch.nan
    norms[0, 3] = 9
    view = _view(x, norms, text, states)
    kept = ids(DART(keep=19).reduce(view))
    assert kept == [j for j in range(20) if j != 3]
    assert int(view.notes["nan_scores"]) == 1


@pytest.mark.parametrize("wrong", [{"layer": 0}, {"image_pivots": 0, "text_pivots": 0}, {"text_pivots": -1}])
def test_settings_that_do_not_go(wrong):
    with pytest.raises(WinnowError, match="dart"):
        DART(**wrong)


def test_the_layer_before_the_cut_is_looked_at():
    (step,) = DART(layer=5).checked_steps(LLAVA)
    assert str(step.at) == "layers[5]"
    assert {s.layer for s in step.needs} == {4}


@pytest.mark.parametrize("build", ["llava_clip", "qwen2_5_vl"])
def test_behind_the_last_norm_of_a_model(build):
    """Its gains differ from channel to channel, so that without it other tokens are kept."""
    model = zoo.model(build)
    model.model.language_model.norm.weight.data.uniform_(0, 4, generator=torch.Generator().manual_seed(1))
    builds = {build: Build(lambda: model, zoo.samples(build, ROWS), zoo.collate)}
    settings = {"keep": 11, "layer": 2, "norm": True}
    check_on_models(DART, partial(by_hand, "dart"), settings=settings, builds=builds)
    with pytest.raises(AssertionError):
        check_on_models(
            DART, lambda *args, norm, **own: by_hand("dart", *args, **own), settings=settings, builds=builds
        )


def _finds_more_than_blind(sample, kept):
    """More of the evidence than blind cuts, and more of all things than FastV before the same layer."""
    from tests.methods.directional import at_random, by_lm, evenly, gap

    k = int(kept[0].sum())
    for blind in (evenly, at_random):
        assert gap(sample.recall(kept), sample.recall(sample.kept(blind, k))).low > 0
    assert gap(sample.recall(kept, sample.objects), sample.recall(by_lm(sample, 2, k), sample.objects)).low > 0


@pytest.mark.system("dart", "directional")
@pytest.mark.xdist_group("samples")
def test_what_duplicates_no_pivot_holds_evidence_and_things(sample):
    _finds_more_than_blind(sample, sample.answers("dart:keep=32")[1])


@pytest.mark.xdist_group("samples")
@pytest.mark.parametrize("stub", ["first_k", "evenly", "at_random"])
def test_finding_fails_for_a_stub(sample, stub):
    from tests.methods import directional

    select = first_k if stub == "first_k" else getattr(directional, stub)
    with pytest.raises(AssertionError):
        _finds_more_than_blind(sample, sample.kept(select, 32))
