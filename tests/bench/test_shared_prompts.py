"""What prompts about one picture begin with: the same layers as without sharing, fewer tokens, and refusals."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, strategies
from transformers import DynamicCache

from tests import zoo
from winnow.bench.shared_layers import SharedLayers
from winnow.bench.shared_prompts import SharedPrompts, beginnings
from winnow.core.plan import Plan
from winnow.engine.compress import compress

from .conftest import BASELINES

EQUAL = ("3 A 4",) * 4  # two questions about each of two pictures
PADDED = ("3 A 4", "3 A 6", "3 A 2", "3 A 5")
PICTURES = ("one", "one", "other", "other")


def _inputs(build, rows):
    """Prompts that all begin with the same words; the first two pictures are equal, and the last two are."""
    made = zoo.inputs(build, rows)
    for ids, mask in zip(made["input_ids"], made["attention_mask"], strict=True):
        ids[mask.argmax() :][:3] = 7
    for name in ("pixel_values", "pixel_values_videos"):
        if name in made:
            half = made[name].shape[0] // 4
            made[name] = torch.cat([made[name][at * half : (at + 1) * half] for at in (0, 0, 2, 2)])
    return made


def _read(build, rows, shared, spec="full"):
    """(logits of the last token, keys and values by layer, rows that the first layer's MLP computed)"""
    model, inputs, computed = zoo.model(build), _inputs(build, rows), []
    plan = Plan(()) if spec == "full" else Plan.of(spec)
    with compress(model, plan) as handle, SharedLayers(handle) as layers, torch.no_grad():
        hook = handle.bound.layers[0].mlp.register_forward_pre_hook(lambda m, a: computed.append(a[0][..., 0].numel()))
        prompts = SharedPrompts(PICTURES) if shared else None
        cache = DynamicCache()
        with layers.under(handle.bind(plan), prompts):
            options = {"max_new_tokens": 1, "do_sample": False, "output_logits": True, "return_dict_in_generate": True}
            (logits,) = model.generate(**inputs, past_key_values=cache, **options).logits
        hook.remove()
    return logits, [(layer.keys, layer.values) for layer in cache.layers], sum(computed)


@pytest.mark.parametrize("spec", ["full", "divprune:keep=50%"])
@pytest.mark.parametrize("rows", [EQUAL, PADDED], ids=["equal", "padded"])
@pytest.mark.parametrize("build", zoo.BUILDS)
def test_layers_make_the_same_of_fewer_tokens(build, rows, spec):
    wanted, stored, tokens = _read(build, rows, shared=False, spec=spec)
    got, own, fewer = _read(build, rows, shared=True, spec=spec)
    torch.testing.assert_close(got, wanted, rtol=1e-4, atol=1e-5)
    pads = _inputs(build, rows)["attention_mask"].argmax(1).tolist()
    for made, plain in zip(own, stored, strict=True):
        for a, b in zip(made, plain, strict=True):  # keys, then values
            assert a.shape == b.shape
            for row, pad in enumerate(pads):
                torch.testing.assert_close(a[row, :, pad:], b[row, :, pad:], rtol=1e-4, atol=1e-5)
    assert fewer < 0.75 * tokens, "two of four pictures are computed once"


HIDDEN = torch.randn(3, 6, 4, generator=torch.Generator().manual_seed(0))
GROUP = torch.tensor([0, 0, 1])


def _rotary(x):
    return (torch.arange(x.shape[1], dtype=torch.float32)[None, :, None].expand(x.shape[0], -1, 2),)


def test_a_beginning_ends_where_rows_of_a_group_differ():
    hidden = HIDDEN.clone()
    hidden[1, :4] = hidden[0, :4]
    begin = beginnings(hidden, _rotary(hidden), None, GROUP)
    assert (begin.width, begin.rows.tolist(), begin.group.tolist()) == (4, [0, 2], [0, 0, 1])
    assert torch.equal(begin.spread(begin.of(hidden)), hidden[:, :4])
    assert beginnings(hidden, _rotary(hidden), None, torch.arange(3)) is None, "each row is a picture of its own"
    hidden[1, 1] += 1
    assert beginnings(hidden, _rotary(hidden), None, GROUP) is None, "one token is not worth it"


@given(strategies.data())
def test_beginnings_are_those_that_are_found_token_by_token(data):
    words = strategies.lists(strategies.integers(0, 1), min_size=1, max_size=8)
    rows = data.draw(strategies.lists(words, min_size=2, max_size=5))
    pictures = data.draw(strategies.lists(strategies.integers(0, 1), min_size=len(rows), max_size=len(rows)))
    group = torch.tensor([list(dict.fromkeys(pictures)).index(p) for p in pictures])
    s = max(map(len, rows))
    hidden, rotary = torch.full((len(rows), s, 1), 9.0), torch.zeros(len(rows), s, 1)
    mask = torch.zeros(len(rows), 1, s, s, dtype=torch.bool)
    for row, own in enumerate(rows):
        pad = s - len(own)
        hidden[row, pad:, 0] = torch.tensor(own, dtype=torch.float32)
        rotary[row, pad:, 0] = torch.arange(len(own), dtype=torch.float32)
        mask[row, 0, pad:, pad:] = torch.ones(len(own), len(own)).tril().bool()
    begin = beginnings(hidden, (rotary,), mask, group)
    first = {}
    for row, picture in enumerate(pictures):
        if picture not in first or len(rows[row]) > len(rows[first[picture]]):
            first[picture] = row
    widths = [s - 1]
    for row, picture in enumerate(pictures):
        own, other = rows[row], rows[first[picture]]
        common = next((n for n, (a, b) in enumerate(zip(own, other, strict=False)) if a != b), len(own))
        widths += [len(other)] + ([] if first[picture] == row else [s - len(own) + common])
    left = len(first) * min(widths) + len(rows) * (s - min(widths))
    if left > 0.85 * len(rows) * s:
        assert begin is None
        return
    assert begin.width == min(widths)
    spread = begin.spread(begin.of(hidden))
    for row, own in enumerate(rows):
        assert torch.equal(spread[row, s - len(own) :], hidden[row, s - len(own) : begin.width])


def _layer(hidden, past_key_values=None, **beside):
    past_key_values.update(hidden[:, None], hidden[:, None], 0)
    return hidden + 1


def _run(hidden=None, mask=None, rotary=None, **beside):
    """The output of a layer, and whether its tokens were shared."""
    if hidden is None:
        hidden = HIDDEN[:1].repeat(3, 1, 1)
        hidden[:, 5] += torch.arange(3)[:, None]
    rotary = _rotary(hidden) if rotary is None else rotary
    given = {"attention_mask": mask, "position_embeddings": rotary, "past_key_values": DynamicCache(), **beside}
    given = {name: x for name, x in given.items() if x is not ...}
    return SharedPrompts("aaa").run(_layer, 0, (hidden,), given)


def test_what_is_not_understood_runs_as_it_is():
    causal = torch.ones(6, 6).tril().bool().expand(3, 1, 6, 6)
    assert torch.equal(_run()[:, :5], HIDDEN[:1, :5].repeat(3, 1, 1) + 1)
    assert _run(mask=causal) is not None
    assert _run(use_cache=True, position_ids=torch.arange(6)[None]) is not None
    both_ways = causal.clone()
    both_ways[..., 1:4, 1:4] = True
    near = causal.clone()
    near[..., 5, 1] = False
    for refused in (
        {"mask": both_ways},
        {"mask": near},
        {"mask": causal.float().log()},
        {"mask": causal[:1]},
        {"rotary": ...},
        {"rotary": tuple(x[None] for x in _rotary(HIDDEN))},
        {"rotary": tuple(x + torch.arange(3)[:, None, None] for x in _rotary(HIDDEN))},
        {"past_key_values": None},
        {"position_ids": torch.zeros(3, 3, 6)},
        {"per_layer_input": torch.zeros(3, 6, 4)},
        {"hidden": HIDDEN},
        {"hidden": HIDDEN[:2]},
    ):
        assert _run(**refused) is None, refused


def test_an_output_that_was_changed_is_compared_anew():
    prompts, hidden = SharedPrompts("aaa"), HIDDEN[:1].repeat(3, 1, 1)
    for change in (lambda x: x, lambda x: x.clone(), lambda x: x.mul_(2)):
        given = {"position_embeddings": _rotary(hidden), "past_key_values": DynamicCache()}
        hidden = change(prompts.run(_layer, 0, (hidden,), given))
    hidden[1, 2] += 1
    given = {"position_embeddings": _rotary(hidden), "past_key_values": DynamicCache()}
    wanted = hidden + 1
    assert torch.equal(prompts.run(_layer, 0, (hidden,), given), wanted)


def test_layers_that_a_plan_looks_at_or_acts_in_are_not_asked_for_whole_pictures():
    with compress(zoo.model("llava_clip"), Plan(())) as handle, SharedLayers(handle) as layers:
        whole = ("visionzip:keep=5", "divprune:keep=5", "tome:r=2")
        for spec in (*whole, "fastv:keep=50%", "v2drop", "mmtok:keep=5", "snapkv:keep=8"):
            assert layers.shares_prompts(handle.bind(Plan.of(spec))) == (spec in whole), spec


@pytest.mark.parametrize("batch", [3, 8])
def test_a_sweep_is_the_same_with_and_without_shared_prompts(batch, sweep, exported, monkeypatch):
    methods = ("fastv", "visionzip", "tome", "divprune", "cdpruner")
    made, run = [], SharedPrompts.run
    monkeypatch.setattr(SharedPrompts, "run", lambda *given: made.append(run(*given)) or made[-1])
    shared, _ = sweep("shared.sqlite", batch=batch, methods=methods, baselines=BASELINES, checked=8)
    assert sum(output is not None for output in made) > len(made) / 2
    monkeypatch.setattr(SharedLayers, "shares_prompts", lambda self, plan: False)
    alone, _ = sweep("alone.sqlite", batch=batch, methods=methods, baselines=BASELINES, checked=8)
    assert exported(shared) == exported(alone)
