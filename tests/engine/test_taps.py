"""What methods are shown equals what eager attention computes, and showing it changes no bit of the model's output."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
import zoo
from byhand import Reference
from cases import picking, same
from probes import Look, Pick, forward, generate

import winnow
from winnow.core.plan import Plan
from winnow.engine.probing import probe_layer
from winnow.signals.language import LMAttention, LMAttentionMass
from winnow.signals.vision import VisionAttention, VisionKeys

ROWS = ("3 A 6", "11", "2 B 4 C 5")


def shown(build, needs, point="projected", plan_before=(), implementation="sdpa"):
    """The views of each sample alone, so that they can be told apart: per row, per picture."""
    model = zoo.model(build)
    model.set_attn_implementation(implementation)
    look = Look(needs=needs, at=point)
    views = []
    with winnow.compress(model, Plan((*plan_before, look))):
        for part in zoo.samples(build, ROWS):
            look.views.clear()
            forward(model, part)
            views.append({signal: look.seen(signal) for signal in needs} if look.views else {})
    return views


@pytest.mark.parametrize("heads", ["mean", "sum"])
@pytest.mark.parametrize("query", ["cls", "all"])
@pytest.mark.parametrize("build", zoo.BUILDS)
def test_attention_of_every_block_of_the_tower_equals_eager(build, query, heads):
    """In the order of the LM's tokens: tiles unpadded and put together, windows undone, four patches in the mean."""
    if query == "cls" and build not in zoo.WITH_CLS:
        with pytest.raises(winnow.UnsupportedError, match=r"\[CLS\]"):
            winnow.compress(zoo.model(build), Look(needs=(VisionAttention(query="cls"),)))
        return
    reference = Reference(zoo.model(build))
    depth = {"llava_clip": 5, "llava_siglip": 4, "llava_next": 5, "qwen2_5_vl": 4}[build]
    needs = tuple(VisionAttention(block, query, heads) for block in range(depth))
    for views, part in zip(shown(build, needs), zoo.samples(build, ROWS), strict=True):
        entry, vision = reference.entry(part), reference.vision(part)
        for picture, cells in enumerate(entry.cells):
            for block, signal in enumerate(needs):
                rows = (vision.cls if query == "cls" else vision.received)[block][picture]
                expected = (rows.sum(0) if heads == "sum" else rows.mean(0))[cells]
                assert (views[signal][picture] - expected).abs().max() <= 1e-6


@pytest.mark.parametrize("build", ["llava_clip", "llava_siglip", "llava_next"])
def test_keys_of_the_tower_equal_those_of_its_projection(build):
    reference = Reference(zoo.model(build))
    depth = 4 if build == "llava_siglip" else 5
    needs = tuple(VisionKeys(block) for block in range(depth))
    prefix = int(build in zoo.WITH_CLS)
    for views, part in zip(shown(build, needs), zoo.samples(build, ROWS), strict=True):
        entry, vision = reference.entry(part), reference.vision(part)
        for picture, cells in enumerate(entry.cells):
            for block, signal in enumerate(needs):
                expected = vision.keys[block][picture][:, prefix:].flatten(0, 1)[cells]
                assert (views[signal][picture] - expected).abs().max() <= 1e-6


@pytest.mark.parametrize("build", ["llava_clip", "llava_siglip", "llava_next"])
def test_at_features_signals_stand_by_the_towers_own_tokens(build):
    """Tile by tile, as the tower gives them; keys of [CLS] included, attention for content tokens."""
    reference = Reference(zoo.model(build))
    row = VisionAttention(query="all")
    for views, part in zip(shown(build, (row, VisionKeys()), "features"), zoo.samples(build, ROWS), strict=True):
        vision = reference.vision(part)
        block = 3  # the feature layer of all three towers: the last but one of five, the last of four
        for picture in range(len(vision.features)):
            assert (views[row][picture] - vision.received[block][picture].mean(0)).abs().max() <= 1e-6
            keys = vision.keys[block][picture].flatten(0, 1)
            assert (views[VisionKeys()][picture] - keys).abs().max() <= 1e-6


@pytest.mark.parametrize("build", ["llava_clip", "llava_siglip", "llava_next"])
def test_tokens_at_features_are_what_the_projector_is_given(build):
    model, look = zoo.model(build), Look(at="features")
    reference = Reference(model)
    with winnow.compress(model, look):
        for part in zoo.samples(build, ROWS):
            look.views.clear()
            forward(model, part)
            tokens = [lane for view in look.views for lane in view.tokens]
            for picture, expected in enumerate(reference.vision(part).features):
                assert (tokens[picture] - expected.flatten(0, 1)).abs().max() <= 1e-5


@pytest.mark.parametrize("build", ["llava_clip", "llava_siglip", "llava_next", "qwen2_5_vl"])
def test_tokens_at_projected_are_the_rows_that_enter_the_lm(build):
    model, look = zoo.model(build), Look()
    reference = Reference(model)
    with winnow.compress(model, look):
        for part in zoo.samples(build, ROWS):
            look.views.clear()
            forward(model, part)
            tokens = [lane for view in look.views for lane in view.tokens]
            entry = reference.entry(part)
            for picture, content in enumerate(entry.content):
                assert torch.equal(tokens[picture], entry.embeds[0, content])


@pytest.mark.parametrize("layer", [0, 1, 2])
@pytest.mark.parametrize("point", ["layers[2]", "layers[3]"])
@pytest.mark.parametrize("build", zoo.BUILDS)
def test_attention_of_the_lm_equals_eager(build, point, layer):
    """A layer that has run was tapped; the layer at the step is probed before it runs."""
    reference = Reference(zoo.model(build))
    last, question = LMAttention(layer), LMAttention(layer, rows="question")
    for views, part in zip(shown(build, (last, question), point), zoo.samples(build, ROWS), strict=True):
        entry = reference.entry(part)
        if not entry.items:
            continue
        trace = reference.run(entry)
        weights = reference.lm_attention(layer, trace.layers[layer], entry).mean(0)
        rows = torch.arange(int(entry.items[-1][-1]) + 1, weights.shape[0])  # the text behind the last picture
        for picture, content in enumerate(entry.content):
            assert (views[last][picture] - weights[-1, content]).abs().max() <= 1e-6
            assert (views[question][picture] - weights[rows][:, content].mean(0)).abs().max() <= 1e-6


@pytest.mark.parametrize("build", zoo.BUILDS)
def test_attention_behind_a_cut_is_that_of_the_rows_that_are_left(build):
    """The signal is in the coordinates of the moment: of eight tokens left, eight numbers, at the right ones."""
    reference = Reference(zoo.model(build))
    tapped, probed = LMAttention(1), LMAttention(2)
    before = (Pick(keep=8, at="layers[1]"),)
    for views, part in zip(shown(build, (tapped, probed), "layers[2]", before), zoo.samples(build, ROWS), strict=True):
        entry = reference.entry(part)
        if not entry.items:
            continue
        trace = reference.run(entry, (), {1: picking(entry, 8)})
        for signal in (tapped, probed):
            weights = reference.lm_attention(signal.layer, trace.layers[signal.layer], entry).mean(0)
            for picture, content in enumerate(entry.content):
                rows = torch.isin(trace.layers[2].held, content)
                assert views[signal][picture].shape == (8,)
                assert (views[signal][picture] - weights[-1, rows]).abs().max() <= 1e-6


@pytest.mark.parametrize("at", [2, 3])
@pytest.mark.parametrize("build", zoo.BUILDS)
def test_what_was_heard_before_a_cut_follows_the_tokens_through_it(build, at):
    """Layer 1 read everything; then most tokens went; a step at the same point, or behind, sees what is left of it."""
    reference = Reference(zoo.model(build))
    signal = LMAttention(1)
    before = (Pick(keep=8, at="layers[2]"),)
    views = shown(build, (signal,), f"layers[{at}]", before)
    for found, part in zip(views, zoo.samples(build, ROWS), strict=True):
        entry = reference.entry(part)
        if not entry.items:
            continue
        trace = reference.run(entry, (), {2: picking(entry, 8)})
        weights = reference.lm_attention(1, trace.layers[1], entry).mean(0)[-1]
        for picture, content in enumerate(entry.content):
            left = content[torch.isin(content, trace.layers[2].held)]
            assert len(left) == 8
            assert (found[signal][picture] - weights[left]).abs().max() <= 1e-6


@pytest.mark.parametrize("build", zoo.BUILDS)
def test_masses_of_attention_equal_eager(build):
    reference = Reference(zoo.model(build))
    towards = LMAttentionMass(1, rows="question", keys="items")
    back = LMAttentionMass(1, rows="items", keys="question")
    inner = LMAttentionMass(1, rows="items", keys="items")
    views = shown(build, (towards, back, inner), "layers[2]")
    for found, part in zip(views, zoo.samples(build, ROWS), strict=True):
        entry = reference.entry(part)
        if not entry.items:
            continue
        weights = reference.lm_attention(1, reference.run(entry).layers[1], entry).mean(0)
        items = torch.cat(entry.content)
        question = torch.arange(int(entry.items[-1][-1]) + 1, weights.shape[0])
        for signal, rows, keys in ((towards, question, items), (back, items, question), (inner, items, items)):
            expected = weights[rows][:, keys].sum(1).mean()
            assert all(abs(mass - expected) <= 1e-6 for mass in found[signal])


@pytest.mark.parametrize("build", zoo.BUILDS)
def test_spans_of_the_caller_are_the_question(build):
    """By default the text behind the last picture; here two tokens in the middle of it."""
    model, part = zoo.model(build), zoo.sample(build, "3 A 9")
    reference = Reference(model)
    entry = reference.entry(part)
    end = part["input_ids"].shape[1]
    signal = LMAttention(1, rows="question")
    look = Look(needs=(signal,), at="layers[2]")
    with winnow.compress(model, look) as handle, handle.using(look, spans=[(end - 5, end - 3)]):
        forward(model, part)
    weights = reference.lm_attention(1, reference.run(entry).layers[1], entry).mean(0)
    expected = weights[end - 5 : end - 3][:, entry.content[0]].mean(0)
    assert (look.seen(signal)[0] - expected).abs().max() <= 1e-6


@pytest.mark.parametrize("spans", [[(5, 5)], [(7, 2)], [(-3, 2)], [(0, 10_000)], "ab", [1, 2], [(0, 1)] * 5])
def test_spans_that_make_no_sense_are_refused(spans):
    model, inputs = zoo.model("llava_clip"), zoo.inputs("llava_clip", zoo.RAGGED)
    plan = Look(needs=(LMAttention(1, rows="question"),), at="layers[2]")

    def run():
        with winnow.compress(model, plan) as handle, handle.using(plan, spans=spans):
            forward(model, inputs)

    with pytest.raises(winnow.WinnowError, match="spans"):
        run()


def test_a_signal_of_a_layer_that_has_not_run_is_refused_at_compress():
    for signal in (LMAttention(3), LMAttentionMass(3)):
        with pytest.raises(winnow.WinnowError, match="has not run"):
            winnow.compress(zoo.model("llava_clip"), Look(needs=(signal,), at="layers[2]"))


def everything(build):
    needs = [VisionAttention(block, query="all") for block in range(4)]
    needs += [LMAttention(layer, rows) for layer in range(3) for rows in ("last", "question")]
    needs += [LMAttentionMass(layer) for layer in range(2)]
    if build in zoo.WITH_CLS:
        needs += [VisionAttention(block) for block in range(4)]
    return tuple(needs)


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
@pytest.mark.parametrize("build", zoo.BUILDS)
def test_looking_at_everything_changes_no_bit(build, implementation):
    model, inputs = zoo.model(build), zoo.inputs(build, ROWS)
    model.set_attn_implementation(implementation)
    plain = generate(model, inputs)
    look = Look(needs=everything(build), at="layers[2]")
    with winnow.compress(model, look):
        assert same(generate(model, inputs), plain)
    assert sum(view.b for view in look.views) == 3


@pytest.mark.parametrize("build", zoo.BUILDS)
def test_sdpa_and_eager_show_the_same(build):
    needs = everything(build)
    fused, plain = (shown(build, needs, "layers[2]", implementation=name) for name in ("sdpa", "eager"))
    for a, b in zip(fused, plain, strict=True):
        for signal in a:
            for x, y in zip(a[signal], b[signal], strict=True):
                assert (x - y).abs().max() <= 1e-6


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64], ids=["bfloat16", "float64"])
@pytest.mark.parametrize("build", zoo.BUILDS)
def test_signals_are_at_least_fp32_whatever_the_model(build, dtype):
    model, inputs = zoo.model(build, dtype=dtype), zoo.inputs(build, ROWS, dtype=dtype)
    look = Look(needs=everything(build), at="layers[2]")
    with winnow.compress(model, look):
        forward(model, inputs)
    for view in look.views:
        for signal in look.needs:
            assert view[signal].dtype is torch.promote_types(dtype, torch.float32)
            assert view[signal].isfinite().all()


@pytest.mark.parametrize("build", zoo.BUILDS)
def test_a_plan_that_is_used_later_brings_its_taps(build):
    """`using` may ask for a block that the attached plan does not look at; signals do not leak between plans."""
    model, part = zoo.model(build), zoo.sample(build, "3 A 6")
    first = Look(needs=(VisionAttention(1, query="all"),))
    second = replace(first, needs=(VisionAttention(2, query="all"), LMAttention(0)), at="layers[1]", views=[])
    with winnow.compress(model, first) as handle:
        forward(model, part)
        with handle.using(second):
            forward(model, part)
        forward(model, part)
    assert len(first.views) == 2
    assert len(second.views) == 1
    assert torch.equal(first.views[0][first.needs[0]], first.views[1][first.needs[0]])
    with pytest.raises(winnow.WinnowError, match="has no"):
        second.views[0][first.needs[0]]


def test_a_probe_of_some_rows_has_their_queries_and_no_others():
    """Before and after the comparison that lets it compute them alone."""
    model = zoo.model("llava_clip")
    lm = model.model.language_model
    layer = lm.layers[1]
    hidden = torch.randn(2, 9, lm.config.hidden_size, generator=torch.Generator().manual_seed(0))
    arguments = {"position_embeddings": lm.rotary_emb(hidden, torch.arange(9)[None])}
    rows = torch.tensor([[5, 6, 7], [8, 3, 8]])
    with torch.no_grad(), winnow.compress(model, Look(needs=(LMAttention(1),), at="layers[1]")):
        q, k = probe_layer(layer, layer.self_attn, (hidden,), arguments, None, None)
        for _ in range(2):
            some, keys = probe_layer(layer, layer.self_attn, (hidden,), arguments, None, rows)
            assert some.shape == q.shape
            torch.testing.assert_close(keys, k, atol=1e-6, rtol=1e-5)
            for b, own in enumerate(rows.tolist()):
                torch.testing.assert_close(some[b, :, own], q[b, :, own], atol=1e-6, rtol=1e-5)
                others = [slot for slot in range(9) if slot not in own]
                assert some[b, :, others].isnan().all()
