"""What visual tokens pay each other in an LM layer, and the keys of a layer, as a plain copy of the model has them."""

from __future__ import annotations

import pytest
import torch
import zoo
from byhand import Reference
from engine.test_taps import ROWS, shown
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

from winnow.signals.language import LMAttention, LMKeys


@pytest.mark.parametrize("layer", [1, 2])
@pytest.mark.parametrize("build", ["llava_clip", "qwen2_5_vl"])
def test_attention_from_the_items_equals_eager(build, layer):
    """A layer that has run was tapped; the layer at the step is probed. Queries are those of all pictures of a row."""
    reference, signal = Reference(zoo.model(build)), LMAttention(layer, rows="items")
    for views, part in zip(shown(build, (signal,), "layers[2]"), zoo.samples(build, ROWS), strict=True):
        entry = reference.entry(part)
        if not entry.items:
            continue
        trace = reference.run(entry)
        weights = reference.lm_attention(layer, trace.layers[layer], entry).mean(0)
        want = weights[torch.cat(entry.content)].mean(0)
        for picture, content in enumerate(entry.content):
            assert (views[signal][picture] - want[content]).abs().max() <= 1e-6


@torch.no_grad()
@pytest.mark.parametrize("layer", [1, 2])
def test_keys_are_those_that_the_layer_attends_by(layer):
    build = "llava_clip"
    reference, signal = Reference(zoo.model(build)), LMKeys(layer)
    block = reference.model.model.language_model.layers[layer]
    for views, part in zip(shown(build, (signal,), "layers[2]"), zoo.samples(build, ROWS), strict=True):
        entry = reference.entry(part)
        if not entry.items:
            continue
        seen = reference.run(entry).layers[layer]
        k = block.self_attn.k_proj(block.input_layernorm(seen.hidden)).unflatten(-1, (-1, block.self_attn.head_dim))
        k = k.transpose(1, 2)
        want = apply_rotary_pos_emb(k, k, *reference.lm.rotary_emb(seen.hidden, entry.positions))[1][0].mean(0)
        for picture, content in enumerate(entry.content):
            assert (views[signal][picture] - want[content]).abs().max() <= 1e-5
