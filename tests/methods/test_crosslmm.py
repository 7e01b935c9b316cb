"""CrossLMM by its card: pooled frames enter the LM; they and the text read all tokens beside it."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
import zoo
from cases import same
from probes import generate
from torch.nn.functional import adaptive_avg_pool2d

import winnow
from winnow.core.cross_read import Rows
from winnow.core.errors import WinnowError
from winnow.core.info import ModelInfo
from winnow.core.layout import Layout
from winnow.core.plan import Plan
from winnow.core.step import State
from winnow.core.view import View
from winnow.methods.crosslmm import CrossLMM
from winnow.testing import Picture

from . import connectors
from .beside import answered
from .directional import gap
from .stubs import STUBS, tokens

WIDTH, T, H, W = 12, 4, 5, 6
INFO = ModelInfo(depth=8, width=WIDTH, heads=4, kv_heads=2, head_dim=6)
OPEN = CrossLMM(weights="untrained", gate=0.9, grid=2)


def clip(seed: int = 0, t: int = T, b: int = 1) -> View:
    return View.of(tokens(seed, t * H * W, WIDTH, b), layout=Layout.grid(H, W, t))


def split(view: View, method: CrossLMM = OPEN) -> tuple[CrossLMM, torch.nn.ModuleDict, Any, dict[str, torch.Tensor]]:
    """The resolved method, its module, the map of what enters, and what is remembered of the first item."""
    resolved, _ = method.bind(INFO)
    module: Any = resolved.build(INFO)
    pooled, state = resolved.split(replace(view, module=module), State())
    return resolved, module, pooled, {name: x[0] for name, x in state.item.items()}


def visual(view: View, method: CrossLMM = OPEN, kept: slice = slice(None)) -> torch.Tensor:
    """What pooled rows of a view read in layer 0; `kept`: those that are left of them."""
    resolved, module, pooled, memory = split(view, method)
    h, ids = pooled.apply(view.tokens)[0], view.ids[0, pooled.representatives[0]]
    rows = Rows(h[kept].tanh(), (memory,), ids=ids[kept], layout=view.layout, module=module)
    return resolved.read("visual", 0, rows)


def text(view: View, method: CrossLMM = OPEN) -> torch.Tensor:
    """What three rows of text read in layer 0."""
    resolved, module, _, memory = split(view, method)
    return resolved.read("text", 0, Rows(tokens(7, 3, WIDTH)[0], (memory,), module=module))


def _pools(reduce: Any) -> None:
    for side in (1, 2, 3, 4):
        view = clip(side)
        made = reduce(view, CrossLMM(grid=side)).apply(view.tokens)[0]
        frames = view.tokens[0].unflatten(0, (T, H, W)).permute(0, 3, 1, 2)
        want = adaptive_avg_pool2d(frames, side).flatten(2).transpose(1, 2).flatten(0, 1)
        assert made.shape == want.shape
        assert (made - want).abs().max() <= 1e-6


@pytest.mark.system("crosslmm", "exact")
def test_each_frame_is_pooled_by_itself():
    _pools(lambda view, method: method.reduce(view))


@pytest.mark.parametrize("stub", STUBS)
def test_pooling_fails_for_a_stub(stub):
    with pytest.raises(AssertionError):
        _pools(lambda view, method: stub(view, method.reduce(view).m))


@pytest.mark.system("crosslmm", "exact")
def test_729_tokens_of_a_frame_are_1_9_or_16():
    for side, left in ((1, 1), (3, 9), (4, 16)):
        view = View.of(tokens(0, 2 * 27 * 27, 4), layout=Layout.grid(27, 27, 2))
        assert CrossLMM(grid=side).reduce(view).m == 2 * left


def _frames_apart(read: Any) -> None:
    view, other = clip(), clip()
    other.tokens[:, H * W : 2 * H * W] += 1.0  # the second frame
    plain, changed = read(view).unflatten(0, (T, -1)), read(other).unflatten(0, (T, -1))
    assert torch.equal(plain[[0, 2, 3]], changed[[0, 2, 3]])
    assert (plain[1] - changed[1]).abs().max() > 1e-3


@pytest.mark.system("crosslmm", "exact")
def test_pooled_rows_read_their_own_frame_alone():
    _frames_apart(visual)
    _frames_apart(lambda view: visual(view, replace(OPEN, shared_gate=True)))


def test_a_reading_of_all_frames_is_told_apart():
    with pytest.raises(AssertionError):
        _frames_apart(lambda view: visual(view, replace(OPEN, scope="all")))


@pytest.mark.system("crosslmm", "exact")
def test_rows_that_are_left_by_another_method_read_what_they_read_before():
    """The two ways to read a frame agree, with unequal numbers of rows of each frame."""
    for kept in (slice(0, 7), slice(1, None, 3)):
        assert (visual(clip(), kept=kept) - visual(clip())[kept]).abs().max() <= 1e-6


@pytest.mark.system("crosslmm", "exact")
def test_text_reads_all_frames_and_knows_where_tokens_stand():
    view = clip()
    for frame in range(T):
        other = clip()
        other.tokens[:, frame * H * W : (frame + 1) * H * W] += 1.0
        assert (text(view) - text(other)).abs().max() > 1e-4
    frames = view.tokens.unflatten(1, (T, -1)).flip(1).flatten(1, 2)
    assert (text(view) - text(replace(view, tokens=frames))).abs().max() > 1e-4


@pytest.mark.system("crosslmm", "exact")
def test_one_frame_is_the_same_by_either_scope():
    picture = View.of(tokens(3, H * W, WIDTH), layout=Layout.grid(H, W))
    assert (visual(picture) - visual(picture, replace(OPEN, scope="all"))).abs().max() <= 1e-6


@pytest.mark.system("crosslmm", "exact")
@pytest.mark.parametrize("queries", ["both", "text", "visual"])
def test_at_gates_of_zero_the_model_is_the_pooled_one_bit_for_bit(queries):
    class Pooled(CrossLMM):
        def cross_reads(self, info):
            return ()

    model, inputs = zoo.model("qwen2_5_vl"), zoo.inputs("qwen2_5_vl", ("3 W 6", "2 X 4 A 5"))
    settings: dict[str, Any] = {"grid": 1, "weights": "untrained", "queries": queries}
    with winnow.compress(model, Plan((Pooled(**settings),))) as handle:
        want = generate(model, inputs)
        with handle.using(Plan((CrossLMM(**settings),), seed=1)):  # another key
            assert same(generate(model, inputs), want)
        with handle.using(Plan((CrossLMM(**settings, gate=0.5),))):
            assert not same(generate(model, inputs), want)


@pytest.mark.system("crosslmm", "exact")
def test_a_grid_as_large_as_the_frame_leaves_it():
    view = clip()
    found = CrossLMM(grid=9).reduce(view)
    assert found.m == view.n
    assert torch.equal(found.apply(view.tokens), view.tokens)


@pytest.mark.parametrize(("queries", "reads"), [("both", 4), ("text", 2), ("visual", 2)])
def test_who_reads_and_where(queries, reads):
    method, module, _, memory = split(clip(), replace(OPEN, queries=queries))
    found = method.cross_reads(INFO)
    assert len(found) == reads
    assert {read.layer for read in found} == {0, 4}
    assert {read.kind for read in found} == ({"text", "visual"} if queries == "both" else {queries})
    assert set(module) == {"text0", "visual0", "text4", "visual4"}  # weights fit whoever reads
    assert len(memory) == 2 + 2 * reads  # and nothing is kept that nobody reads


def test_a_shared_gate_is_that_of_the_text():
    method, module, pooled, memory = split(clip(), replace(OPEN, shared_gate=True))
    module["visual0"].gate.data.zero_()
    h, ids = pooled.apply(clip().tokens)[0], clip().ids[0, pooled.representatives[0]]
    rows = Rows(h, (memory,), ids=ids, layout=clip().layout, module=module)
    assert method.read("visual", 0, rows).abs().max() > 1e-3
    assert replace(method, shared_gate=False).read("visual", 0, rows).abs().max() == 0


def test_tiles_and_thinned_pictures_are_not_pooled_and_thinned_videos_refused():
    tiled = View.of(tokens(0, 16 + 32, WIDTH), layout=Picture.tiled(4, 2, 1).lm)
    assert OPEN.reduce(tiled).m == 48
    picture = View.of(tokens(0, H * W, WIDTH), layout=Layout.grid(H, W))
    for view, left in ((picture, H * W - 1), (clip(), None)):
        thin = replace(view, tokens=view.tokens[:, :-1], ids=view.ids[:, :-1])
        if left is not None:
            assert OPEN.reduce(thin).m == left
            continue
        with pytest.raises(WinnowError, match="an earlier method has removed some"):
            OPEN.reduce(thin)


def test_settings_that_no_model_has_are_refused():
    with pytest.raises(WinnowError, match="8 LM layers"):
        CrossLMM(layers=(8,)).bind(INFO)
    with pytest.raises(WinnowError, match="grid=0"):
        CrossLMM(grid=0)
    with pytest.raises(WinnowError, match="trained for another model"):
        winnow.compress(zoo.model("qwen2_5_vl"), "crosslmm")


@pytest.mark.system("crosslmm", "directional")
@pytest.mark.xdist_group("connectors")
def test_trained_it_answers_more_than_pooled_frames_alone_and_than_fewer_frames():
    """Untrained, its gates are shut, and it is the pooled model."""
    found = connectors.of_method("crosslmm")
    assert found.over_untrained.low > 0
    assert found.over_frames.low > 0


@pytest.mark.system("crosslmm", "directional")
@pytest.mark.xdist_group("connectors")
def test_what_is_read_is_the_clip():
    """Beside the tokens of another clip fewer questions are answered."""
    other = answered("crosslmm", lambda output: replace(output, memory=output.memory[1:] + output.memory[:1]))
    assert gap(answered("crosslmm"), other).low > 0
