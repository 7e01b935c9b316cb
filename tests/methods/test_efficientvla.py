"""EfficientVLA's choice of visual tokens by its card: key tokens, relevant ones, and ones unlike the key."""

from __future__ import annotations

import pytest
import torch
from torch.nn.functional import cosine_similarity

from winnow.contract import TextAttention
from winnow.core.errors import WinnowError
from winnow.core.info import ModelInfo
from winnow.core.view import View
from winnow.methods.efficientvla import EfficientVLA

from .stubs import STUBS, first_k, ids, scores, tokens


def _view(x, relevance):
    """Of the two values the maximum is not read."""
    return View.of(x, torch.stack([relevance, scores(77, x.shape[1], len(x))], -1))


def _naive(x, relevance, keep, key, alpha):
    lowest, highest = min(relevance), max(relevance)
    score = [(r - lowest) / (highest - lowest) for r in relevance]
    left = sorted(range(len(x)), key=lambda j: -score[j])
    keys, left = left[: min(key, keep)], left[min(key, keep) :]
    more = keep - len(keys)
    task, left = left[: int(alpha * more)], left[int(alpha * more) :]
    far = {j: 1 - max(float(cosine_similarity(x[j], x[i], dim=0)) for i in keys) for j in left}
    return sorted(keys + task + sorted(left, key=lambda j: -far[j])[: more - len(task)])


def _is_the_paper(reduce):
    for seed in range(5):
        x, relevance = tokens(seed, 40), scores(seed + 5, 40)
        for keep, key, alpha in ((1, 6, 0.5), (5, 6, 0.5), (12, 4, 0.5), (20, 8, 0.25), (20, 1, 0.0), (30, 5, 1.0)):
            found = ids(reduce(_view(x, relevance), keep, key, alpha))
            assert found == _naive(x[0], relevance[0].tolist(), keep, key, alpha)


@pytest.mark.system("efficientvla", "exact")
def test_equals_the_paper_written_naively():
    _is_the_paper(lambda view, keep, key, alpha: EfficientVLA(keep=keep, key=key, alpha=alpha).reduce(view))


@pytest.mark.parametrize("stub", STUBS)
def test_the_paper_fails_for_a_stub(stub):
    with pytest.raises(AssertionError):
        _is_the_paper(lambda view, keep, key, alpha: stub(view, keep))


@pytest.mark.system("efficientvla", "exact")
def test_all_relevant_is_the_top_of_relevance_and_none_is_far_from_the_key():
    x, relevance = tokens(2, 50), scores(3, 50)
    everything = ids(EfficientVLA(keep=20, alpha=1.0).reduce(_view(x, relevance)))
    assert everything == relevance[0].topk(20).indices.sort().values.tolist()
    x[0, 10:30] = x[0, int(relevance.argmax())]
    relevance[0, 10:30] = 0
    kept = ids(EfficientVLA(keep=20, alpha=0.0, key=1).reduce(_view(x, relevance)))
    assert not {*range(10, 30)} & set(kept)  # doubles of the key token


@pytest.mark.system("efficientvla", "exact")
@pytest.mark.parametrize(("keep", "key", "alpha", "task"), [(56, 6, 0.5, 25), (16, 6, 0.29, 2), (106, 6, 0.29, 29)])
def test_counts_of_the_parts_are_rounded_down(keep, key, alpha, task):
    x, relevance = tokens(1, 256), torch.linspace(1, 0, 256)[None]
    x[0, key + task : key + task + 20] = x[0, 0]  # the next most relevant are doubles of a key token
    kept = ids(EfficientVLA(keep=keep, key=key, alpha=alpha).reduce(_view(x, relevance)))
    assert len(kept) == keep
    assert kept[: key + task] == list(range(key + task))
    assert kept[key + task] >= key + task + 20


def test_a_broken_token_is_kept_last():
    x, relevance = tokens(4, 20), scores(4, 20)
    x[0, 3], relevance[0, 8] = torch.nan, torch.nan
    view = _view(x, relevance)
    assert ids(EfficientVLA(keep=18).reduce(view)) == [j for j in range(20) if j not in (3, 8)]
    assert int(view.notes["nan_scores"]) == 2


def test_the_layer_before_the_cut_is_read():
    (step,) = EfficientVLA(layer=3).checked_steps(ModelInfo(depth=8))
    assert (str(step.at), step.needs) == ("layers[3]", (TextAttention(2),))


@pytest.mark.parametrize("wrong", [{"layer": 0}, {"key": 0}, {"alpha": 1.2}])
def test_settings_that_do_not_go(wrong):
    with pytest.raises(WinnowError, match="efficientvla"):
        EfficientVLA(**wrong)


def _finds_more_than_blind(sample, kept):
    """More of the evidence, and of all things, than blind cuts."""
    from tests.methods.directional import at_random, evenly, gap

    k = int(kept[0].sum())
    for blind in (evenly, at_random):
        for mask in (sample.evidence, sample.objects):
            assert gap(sample.recall(kept, mask), sample.recall(sample.kept(blind, k), mask)).low > 0


@pytest.mark.system("efficientvla", "directional")
@pytest.mark.xdist_group("samples")
def test_the_tokens_of_the_task_hold_evidence_and_things(sample):
    _finds_more_than_blind(sample, sample.answers("efficientvla:keep=32")[1])


@pytest.mark.xdist_group("samples")
@pytest.mark.parametrize("stub", ["first_k", "evenly", "at_random"])
def test_finding_fails_for_a_stub(sample, stub):
    from tests.methods import directional

    select = first_k if stub == "first_k" else getattr(directional, stub)
    with pytest.raises(AssertionError):
        _finds_more_than_blind(sample, sample.kept(select, 32))
