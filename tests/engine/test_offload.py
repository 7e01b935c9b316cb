"""Weights that accelerate brings from memory or from disk for each call: the answers are those of the model itself."""

from __future__ import annotations

import accelerate
import pytest
import torch
import zoo
from cases import CASES, same
from probes import forward, generate

import winnow

PLACES = {
    "all but the head on disk": {
        "model.vision_tower": "disk",
        "model.multi_modal_projector": "disk",
        "model.language_model": "disk",
    },
    "every other layer on disk": {f"model.language_model.layers.{i}": "disk" for i in (1, 3)},
}


@pytest.mark.parametrize("where", PLACES)
@pytest.mark.parametrize("kind", ["received", "folded", "probed"])
def test_offloaded_weights_answer_as_their_model(kind, where, tmp_path):
    build = "llava_clip"
    plain, inputs = zoo.model(build), zoo.inputs(build, zoo.MIXED)
    model = accelerate.dispatch_model(
        zoo.model(build), parts(PLACES[where]), main_device="cpu", offload_dir=str(tmp_path)
    )
    assert any(weight.is_meta for weight in model.parameters()), "nothing is offloaded"
    with winnow.compress(plain, CASES[kind].plan), winnow.compress(model, CASES[kind].plan) as handle:
        assert same(generate(model, inputs), generate(plain, inputs))
        assert torch.equal(forward(model, inputs).logits, forward(plain, inputs).logits)
        assert handle.bound.device == torch.device("cpu")
    assert same(generate(model, inputs), generate(plain, inputs))


def parts(places):
    """Every part that has no place of its own is on the CPU."""
    lm = "model.language_model"
    rest = dict.fromkeys(("model.vision_tower", "model.multi_modal_projector", "lm_head"), "cpu")
    if lm not in places:
        rest |= {f"{lm}.{name}": "cpu" for name in ("embed_tokens", "norm", "rotary_emb")}
        rest |= {f"{lm}.layers.{i}": "cpu" for i in range(zoo.DEPTH)}
    return rest | places
