"""FlowCut: its score from queries, keys and values, the released schedule of cuts, and evidence that it keeps."""

from __future__ import annotations

import math

import pytest
import torch
import zoo

import winnow
from tests.methods.directional import at_random, evenly, gap
from winnow.core.errors import UnsupportedError, WinnowError
from winnow.core.info import ModelInfo
from winnow.core.layout import Layout
from winnow.core.plan import Plan
from winnow.core.step import Observe, Reduce, State
from winnow.core.view import View
from winnow.methods.flowcut import Flow, FlowCut
from winnow.signals.vision import TowerAttention, VisionAttention
from winnow.testing import WITHOUT_CLS

from .stubs import first_k, ids, scores, tokens, uniform

LLAVA = ModelInfo("LLaVA", depth=32, vision_depth=24, feature_layer=-2, points=("blocks", "projected", "layers"))


def _tower(seed, n=20, heads=3, d=8, prefix=0, dtype=torch.float32):
    q, k, v = torch.randn(3, 2, heads, n, d, generator=torch.Generator().manual_seed(seed)).to(dtype)
    return TowerAttention(q, k, v, d**-0.5, prefix)


def _scores_are_the_code(read):
    for seed in range(3):
        seen = _tower(seed)
        found = read(seen)
        for tile in range(2):
            q, k, v = (x[tile].double() for x in (seen.q, seen.k, seen.v))
            heads, n = range(len(q)), q.shape[1]
            row = sum((q[h, 0] @ k[h].T * seen.scaling).softmax(0) for h in heads) / len(q)
            alike = sum((v[h, 0] @ v[h].T).softmax(0) for h in heads) / len(q)
            relation, semantic = sum(row[1:].tolist()), sum(alike[1:].tolist())
            for j in range(1, n):
                size = sum(abs(sum(float(v[h, j, i]) for h in heads) / len(q)) for i in range(v.shape[2]))
                want = (float(row[j]) / relation + float(alike[j]) / semantic) * size
                assert float(found[tile, j]) == pytest.approx(want, rel=1e-4)


@pytest.mark.system("flowcut", "exact")
def test_the_score_is_that_of_the_code():
    _scores_are_the_code(Flow(0).read)


@pytest.mark.parametrize("stub", [VisionAttention(0).read, VisionAttention(0, query="all").read])
def test_the_score_fails_for_plain_attention(stub):
    with pytest.raises(AssertionError):
        _scores_are_the_code(stub)


def test_the_score_of_cls_is_0_and_left_out_behind_the_tower():
    whole, patches = Flow(0).read(_tower(1)), Flow(0).read(_tower(1, prefix=1))
    assert whole[:, 0].tolist() == [0, 0]
    assert torch.equal(whole[:, 1:], patches)


def test_half_precision_is_scored_in_fp32():
    assert Flow(0).read(_tower(2, dtype=torch.bfloat16)).dtype == torch.float32


def _shown(block, n, peaked):
    """What a block shows of each of n patches: attention of [CLS], the more even the lower `peaked`, and a score."""
    generator = torch.Generator().manual_seed(block)
    return (peaked * torch.randn(n, generator=generator)).softmax(0), torch.rand(n, generator=generator)


def _released(n, target, depth, peaked):
    """The patches that the authors' loop leaves behind each block, by lists."""
    select, held, running, after = depth - 2, list(range(n)), None, []
    for block in range(depth):
        left = select - block - 1
        row, score = _shown(block, n, peaked)
        if len(held) > target:
            own = [float(score[j]) for j in held]
            running = own if running is None else [0.5 * a + 0.5 * b for a, b in zip(running, own, strict=True)]
            if left % 2 == 0:
                parts = [float(row[j]) / sum(float(row[i]) for i in held) for j in held]
                even = -sum(p * math.log(p) for p in parts) / math.log(len(held))
                drop = round((len(held) - target) / left**0.5 * (1 - even**2)) if left > 0 else len(held) + 1
                k = max(len(held) - drop, target)
                rows = sorted(sorted(range(len(held)), key=lambda i: -running[i])[:k])
                held, running = [held[i] for i in rows], [running[i] for i in rows]
        after.append(list(held))
    return after


def _run(n, target, depth, peaked, choose=None):
    """The patches that our steps leave behind each block."""
    info = ModelInfo(depth=32, vision_depth=depth, feature_layer=-2, points=LLAVA.points)
    *blocks, _ = Plan.of(f"flowcut:released,keep={target}").methods[0].bind(info)[1]
    layout, held, state, after = Layout.grid(1, n, cls=True), torch.arange(n + 1)[None], State(), []
    for block, step in enumerate(blocks):
        assert str(step.at) == f"blocks[{block + 1}]"
        row, score = (torch.cat([torch.zeros(1), x])[held[0]][None] for x in _shown(block, n, peaked))
        named = dict(zip(step.needs, (row, score), strict=True))
        view = View(tokens(0, held.shape[1], 4), layout, held, n, step.signals(named.__getitem__))
        action, state = step.act(view, state)
        if not isinstance(action, Observe):
            assert isinstance(action, Reduce)
            index = action.reduction.index[0] if choose is None else choose(view, action.reduction.m).index[0]
            assert index[0] == 0
            held = held[:, index]
            state = State({name: value[:, index] for name, value in state.token.items()})
        after.append((held[0, 1:] - 1).tolist())
    return after


def _is_the_code(choose=None):
    for n, target, depth, peaked in ((100, 20, 24, 0.5), (100, 20, 24, 2.0), (64, 7, 12, 1.0), (50, 9, 7, 3.0)):
        found = _run(n, target, depth, peaked, choose)
        assert found == _released(n, target, depth, peaked)[: depth - 2]
        assert len(found[-1]) == target


@pytest.mark.system("flowcut", "exact")
def test_cuts_are_those_of_the_released_code():
    _is_the_code()


@pytest.mark.parametrize("stub", [first_k, uniform])
def test_cuts_fail_for_a_stub(stub):
    with pytest.raises(AssertionError):
        _is_the_code(stub)


@pytest.mark.system("flowcut", "exact")
def test_cuts_of_llava_are_behind_every_second_block_and_the_last_before_the_feature_block():
    *blocks, end = FlowCut(keep=64).checked_steps(LLAVA)
    assert (len(blocks), str(end.at)) == (22, "projected")
    cut = [block for block, n in enumerate(map(len, _run(576, 64, 24, 2.0))) if n < 576]
    assert cut[0] in (1, 3)
    assert len(_run(576, 64, 24, 2.0)[21]) == 64


@pytest.mark.system("flowcut", "exact")
def test_a_picture_without_focus_is_cut_last_and_a_peaked_one_early():
    """Uniform attention has full entropy: nothing goes before the last cut."""
    even, peaked = (list(map(len, _run(100, 10, 24, p))) for p in (0.0, 4.0))
    assert even == [100] * 21 + [10]
    assert all(a < b for a, b in zip(peaked[3:21], even[3:21], strict=True))


@pytest.mark.system("flowcut", "exact")
@pytest.mark.parametrize("keep", range(1, 35, 3))
def test_count_is_exact_behind_the_last_cut(keep):
    seed = keep
    view = View(tokens(0, 31, b=2), Layout.grid(5, 6, cls=True), torch.arange(31).expand(2, -1), 30)
    action, _ = FlowCut(keep=keep).flow(view, State(), scores(seed, 31, b=2), scores(seed + 1, 31, b=2), 0)
    assert [len(ids(action, i)) for i in (0, 1)] == [1 + min(30, keep)] * 2


def test_tiles_are_cut_as_far_as_each_alone_asks_for():
    view = View(tokens(0, 31, b=2), Layout.grid(5, 6, cls=True), torch.arange(31).expand(2, -1), 30)
    rows = torch.stack([torch.ones(31), torch.cat([torch.zeros(1), (9 * scores(1, 30)[0]).softmax(0)])])
    flow = scores(3, 31, b=2)
    action, _ = FlowCut(keep=5).flow(view, State(), rows, flow, 2)
    alone = [
        FlowCut(keep=5).flow(
            View(view.tokens[i : i + 1], view.layout, view.ids[:1], 30), State(), rows[i : i + 1], flow[i : i + 1], 2
        )[0]
        for i in (0, 1)
    ]
    assert action.counts[0] == 31
    assert action.counts[1] < 31
    assert [ids(action, i) for i in (0, 1)] == [ids(own) for own in alone]


def test_ties_go_to_the_first_and_broken_patches_go():
    view = View(tokens(0, 31), Layout.grid(5, 6, cls=True), torch.arange(31)[None], 30)
    flow = torch.ones(1, 31)
    assert ids(FlowCut(keep=4).flow(view, State(), flow, flow, 0)[0]) == [0, 1, 2, 3, 4]
    flow[0, 2] = torch.nan
    kept, state = FlowCut(keep=4).flow(view, State(), flow, flow, 0)
    assert ids(kept) == [0, 1, 3, 4, 5]
    assert int(view.notes["nan_scores"]) == 1
    assert state.token["flow"][0, 2] == -torch.inf


@pytest.mark.parametrize("row", [torch.zeros(1, 31), torch.full((1, 31), torch.nan)])
def test_attention_of_nothing_and_broken_attention_cut_nothing_early(row):
    view = View(tokens(0, 31), Layout.grid(5, 6, cls=True), torch.arange(31)[None], 30)
    assert FlowCut(keep=4).flow(view, State(), row, torch.ones(1, 31), 2)[0].m == 31


def test_with_tiles_the_item_keeps_its_budget():
    model, (sample,) = zoo.model("llava_next"), zoo.samples("llava_next", ("3 C 6",))
    with torch.no_grad():
        for plan, entered in (("flowcut:keep=12", 12), ("flowcut:keep=12,tile=6", 12), ("flowcut:keep=12,tile=2", 10)):
            with winnow.compress(model, plan) as handle:
                model(**sample)
                (item,) = handle.last.items
                assert len(item.kept) == entered


def test_needs_cls_and_a_block_before_the_feature_block():
    with pytest.raises(UnsupportedError, match=r"no \[CLS\]|does not offer"):
        FlowCut().checked_steps(WITHOUT_CLS)
    with pytest.raises(UnsupportedError, match="no block before"):
        FlowCut().checked_steps(ModelInfo(vision_depth=1))


@pytest.mark.parametrize("wrong", [{"keep": 0}, {"tile": 1.5}])
def test_bad_settings(wrong):
    with pytest.raises(WinnowError, match=f"flowcut: {next(iter(wrong))}="):
        FlowCut(**wrong)


def _finds_evidence(sample, kept):
    """More of the evidence, and of all things, than blind selections."""
    for blind in (evenly, at_random):
        other = sample.kept(blind, 32)
        for mask in (sample.evidence, sample.objects):
            assert gap(sample.recall(kept, mask), sample.recall(other, mask)).low > 0


@pytest.mark.system("flowcut", "directional")
@pytest.mark.xdist_group("samples")
def test_what_flows_to_cls_finds_evidence_and_objects(few):
    _finds_evidence(few, few.answers("flowcut:keep=32")[1])


@pytest.mark.xdist_group("samples")
@pytest.mark.parametrize("stub", [first_k, evenly, at_random])
def test_finding_fails_for_a_stub(few, stub):
    with pytest.raises(AssertionError):
        _finds_evidence(few, few.kept(stub, 32))
