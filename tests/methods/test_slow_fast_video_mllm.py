"""Slow-Fast by its card: means over frames enter the LM, and text reads all tokens beside it."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
import zoo
from cases import same
from probes import generate
from torch.utils.flop_counter import FlopCounterMode

import winnow
from winnow.core.cross_read import Rows
from winnow.core.errors import WinnowError
from winnow.core.info import ModelInfo
from winnow.core.layout import Layout
from winnow.core.plan import Plan
from winnow.core.step import State
from winnow.core.view import View
from winnow.methods.slow_fast_video_mllm import SlowFast

from . import connectors
from .beside import answered
from .directional import gap
from .stubs import STUBS, tokens

WIDTH, HEADS, GROUPS, DIM, P = 12, 4, 2, 6, 5
INFO = ModelInfo(depth=28, width=WIDTH, heads=HEADS, kv_heads=GROUPS, head_dim=DIM)
OPEN = SlowFast(weights="untrained", gate=0.9, least=1)


def clip(t: int, b: int = 1, seed: int = 0) -> View:
    return View.of(tokens(seed, t * P, WIDTH, b), layout=Layout.grid(1, P, t))


def bound(method: SlowFast = OPEN) -> tuple[SlowFast, torch.nn.ModuleDict]:
    resolved, _ = method.bind(INFO)
    return resolved, resolved.build(INFO)  # type: ignore[return-value]


def memory(view: View, method: SlowFast = OPEN) -> dict[str, torch.Tensor]:
    """What is remembered of the first item of a view."""
    resolved, module = bound(method)
    _, state = resolved.split(replace(view, module=module), State())
    return {name: x[0] for name, x in state.item.items()}


def text(n: int, *items: dict[str, torch.Tensor], method: SlowFast = OPEN, seed: int = 5) -> tuple[Rows, SlowFast]:
    resolved, module = bound(method)
    generator = torch.Generator().manual_seed(seed)
    o, q = torch.randn(n, HEADS * DIM, generator=generator), torch.randn(HEADS, n, DIM, generator=generator)
    return Rows(o, items, q, module=module), resolved


def naive(frames: torch.Tensor, stride: int, least: int, pad: str) -> list[torch.Tensor]:
    """`[t, P, D]`: the rows that enter, one by one."""
    t = len(frames)
    if -(-t // stride) < least:
        parts = min(t, least)
        spans = [range(i * t // parts, -(-((i + 1) * t) // parts)) for i in range(parts)]
        return [torch.stack([frames[i, p] for i in span]).mean(0) for span in spans for p in range(P)]
    filled = list(frames)
    while len(filled) % stride:
        filled.append(filled[-1] if pad == "repeat" else torch.zeros_like(filled[-1]))
    windows = [filled[i : i + stride] for i in range(0, len(filled), stride)]
    return [sum(frame[p] for frame in window) / stride for window in windows for p in range(P)]


def _pools(reduce: Any) -> None:
    for t, stride, least, pad in ((8, 4, 1, "repeat"), (10, 4, 2, "repeat"), (10, 4, 2, "zeros"), (7, 4, 3, "repeat")):
        view = clip(t)
        made = reduce(view, SlowFast(stride=stride, least=least, pad=pad)).apply(view.tokens)[0]
        want = torch.stack(naive(view.tokens[0].unflatten(0, (t, P)), stride, least, pad))
        assert made.shape == want.shape
        assert (made - want).abs().max() <= 1e-6


@pytest.mark.system("slow-fast-video-mllm", "exact")
def test_fast_tokens_are_means_over_frames():
    _pools(lambda view, method: method.reduce(view))


@pytest.mark.parametrize("stub", STUBS)
def test_means_over_frames_fail_for_a_stub(stub):
    with pytest.raises(AssertionError):
        _pools(lambda view, method: stub(view, method.reduce(view).m))


@pytest.mark.system("slow-fast-video-mllm", "exact")
def test_as_released_64_frames_are_16_and_65_are_17_of_which_the_last_is_dimmed():
    (method,) = Plan.of("slow-fast-video-mllm:released").methods
    for t, left in ((64, 16), (65, 17), (30, 16), (9, 9)):
        view = clip(t)
        found = method.reduce(view)
        assert found.m == left * P
        mass = found.mass[0].unflatten(0, (left, P))
        assert mass[:-1].allclose(torch.ones(()))
        assert mass[-1].allclose(torch.tensor(0.25 if t == 65 else 1.0))


@pytest.mark.system("slow-fast-video-mllm", "exact")
def test_what_text_reads_is_attention_to_the_slow_tokens_times_both_gates():
    """Row by row and head by head, with the layer's own queries."""
    view = clip(6)
    (rows, method), layer = text(3, memory(view)), "8"
    hybrid = rows.module[layer]
    x = view.tokens[0] / (view.tokens[0].pow(2).mean(-1, keepdim=True) + 1e-6).sqrt()
    keys, values = x @ hybrid.beside.k.weight.T, x @ hybrid.beside.v.weight.T
    found = method.read(layer, rows)
    for row in range(3):
        context = []
        for head in range(HEADS):
            own = slice(head // (HEADS // GROUPS) * DIM, (head // (HEADS // GROUPS) + 1) * DIM)
            share = (keys[:, own] @ rows.queries[head, row] / DIM**0.5).softmax(0)
            context.append(share @ values[:, own])
        gate = (hybrid.open.weight[0] @ rows.carried[row]).tanh() * torch.tensor(0.9).tanh()
        assert (found[row] - gate * torch.cat(context)).abs().max() <= 1e-5


@pytest.mark.system("slow-fast-video-mllm", "exact")
def test_the_order_of_slow_tokens_does_not_matter_and_which_they_are_does():
    view = clip(6)
    order = torch.randperm(view.n, generator=torch.Generator().manual_seed(0))
    moved = replace(view, tokens=view.tokens[:, order])
    rows, method = text(3, memory(view))
    same_rows, other = replace(rows, memory=(memory(moved),)), replace(rows, memory=(memory(clip(6, seed=9)),))
    assert (method.read("0", rows) - method.read("0", same_rows)).abs().max() <= 1e-6
    assert (method.read("0", rows) - method.read("0", other)).abs().max() > 1e-3


@pytest.mark.system("slow-fast-video-mllm", "exact")
def test_items_of_a_sample_are_read_as_one():
    a, b = clip(4), clip(3, seed=2)
    both = View.of(torch.cat([a.tokens, b.tokens], 1), layout=Layout.grid(1, P, 7))
    rows, method = text(2, memory(a), memory(b))
    assert (method.read("0", rows) - method.read("0", replace(rows, memory=(memory(both),)))).abs().max() <= 1e-6


@pytest.mark.system("slow-fast-video-mllm", "exact")
@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
def test_at_a_gate_of_zero_the_model_is_the_one_on_fast_tokens_bit_for_bit(implementation):
    class Fast(SlowFast):
        def cross_reads(self, info):
            return ()

    model, inputs = zoo.model("qwen2_5_vl"), zoo.inputs("qwen2_5_vl", ("3 W 6", "2 X 4 W 5"))
    model.set_attn_implementation(implementation)
    settings: dict[str, Any] = {"stride": 4, "least": 1, "weights": "untrained"}
    with winnow.compress(model, Plan((Fast(**settings),))) as handle:
        want = generate(model, inputs)
        with handle.using(Plan((SlowFast(**settings),), seed=1)):  # another key
            assert same(generate(model, inputs), want)
        with handle.using(Plan((SlowFast(**settings, gate=0.5),))):
            assert not same(generate(model, inputs), want)


@pytest.mark.system("slow-fast-video-mllm", "exact")
def test_twice_as_many_frames_cost_text_twice_as_much_at_as_many_fast_tokens():
    """Operations of one layer's reading grow by a constant for each frame, and the sequence does not."""
    counted = []
    for t in (8, 16, 32):
        kept = memory(clip(t))
        rows, method = text(4, kept)
        with FlopCounterMode(display=False) as counter:
            method.read("0", rows)
        counted.append(counter.get_total_flops())
        assert replace(method, stride=t // 2, least=1).reduce(clip(t)).m == 2 * P
    assert counted[2] - counted[1] == 2 * (counted[1] - counted[0]) > 0


@pytest.mark.parametrize(
    ("depth", "layers"), [(28, (0, 8, 16, 24)), (16, (0, 8)), (8, (0, 2, 4, 6)), (4, (0, 1, 2, 3)), (2, (0, 1))]
)
def test_the_layers_that_read(depth, layers):
    resolved, _ = SlowFast().bind(replace(INFO, depth=depth))
    assert resolved.layers == layers
    reads = resolved.cross_reads(INFO)
    assert [(read.layer, read.kind, read.place) for read in reads] == [(k, "text", "heads") for k in layers]


def test_a_picture_stays_as_it_is_and_a_thinned_video_is_refused():
    assert SlowFast().reduce(clip(1)).is_selection
    view = clip(6)
    thin = replace(view, tokens=view.tokens[:, :-1], ids=view.ids[:, :-1])
    with pytest.raises(WinnowError, match="an earlier method has removed some"):
        SlowFast().reduce(thin)


def test_settings_that_no_model_has_are_refused():
    with pytest.raises(WinnowError, match="28 LM layers"):
        SlowFast(layers=(28,)).bind(INFO)
    with pytest.raises(WinnowError, match="stride=0"):
        SlowFast(stride=0)
    with pytest.raises(WinnowError, match="trained for another model"):
        winnow.compress(zoo.model("qwen2_5_vl"), "slow-fast-video-mllm")


@pytest.mark.system("slow-fast-video-mllm", "directional")
@pytest.mark.xdist_group("connectors")
def test_trained_it_answers_more_than_on_fast_tokens_alone():
    """Untrained, its gates are shut, and it is the model on fast tokens."""
    assert connectors.of_method("slow-fast-video-mllm").over_untrained.low > 0


@pytest.mark.system("slow-fast-video-mllm", "directional")
@pytest.mark.xdist_group("connectors")
def test_what_text_reads_is_the_clip():
    """Beside the slow tokens of another clip fewer questions are answered."""
    slug = "slow-fast-video-mllm"
    other = answered(slug, lambda output: replace(output, memory=output.memory[1:] + output.memory[:1]))
    assert gap(answered(slug), other).low > 0
