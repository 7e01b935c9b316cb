"""What compression does not do is refused in its own words, and the model works afterwards."""

from __future__ import annotations

import pytest
import torch
import zoo
from cases import same
from probes import Pick, forward, generate
from transformers import DynamicCache
from transformers.cache_utils import DynamicSlidingWindowLayer, QuantizedLayer, StaticLayer

import winnow


@pytest.mark.parametrize(
    ("options", "reason"),
    [({"cache_implementation": "static"}, "static"), ({"prefill_chunk_size": 8}, "chunk")],
    ids=["static", "chunked"],
)
@pytest.mark.parametrize("build", zoo.BUILDS)
def test_what_cannot_hold_a_reduced_prompt_is_refused(build, options, reason):
    """In winnow's own words, and the model works afterwards."""
    model, inputs = zoo.model(build), zoo.inputs(build, zoo.RAGGED)
    with winnow.compress(model, Pick(keep=3)):
        expected = generate(model, inputs)
        with pytest.raises(winnow.WinnowError, match=reason):
            generate(model, inputs, **options)
        assert same(generate(model, inputs), expected)


class Rounded(QuantizedLayer):
    """A quantized layer as transformers has them, without a library for it."""

    def _quantize(self, tensor, axis):
        return tensor

    def _dequantize(self, tensor):
        return tensor


LAYERS = {
    "static": lambda: StaticLayer(max_cache_len=512),
    "sliding": lambda: DynamicSlidingWindowLayer(sliding_window=8),
    "quantized": lambda: Rounded(residual_length=4),
}


@pytest.mark.parametrize("make", LAYERS.values(), ids=LAYERS)
@pytest.mark.parametrize("build", zoo.BUILDS)
def test_caches_of_other_kinds_are_refused_by_name(build, make):
    model, inputs = zoo.model(build), zoo.inputs(build, zoo.SINGLE)
    cache = DynamicCache(config=model.config.get_text_config())
    cache.layers = [make() for _ in cache.layers]
    with winnow.compress(model, Pick(keep=3)):
        with pytest.raises(winnow.UnsupportedError, match=r"cache.*dynamic cache"):
            forward(model, inputs, past_key_values=cache)
        forward(model, inputs)


def test_a_prepared_mask_is_refused():
    model, inputs = zoo.model("llava_clip"), zoo.inputs("llava_clip", zoo.SINGLE)
    n = inputs["input_ids"].shape[1]
    prepared = torch.ones(1, 1, n, n, dtype=torch.bool).tril()
    with winnow.compress(model, Pick(keep=3)), pytest.raises(winnow.UnsupportedError, match="2-D attention_mask"):
        forward(model, {**inputs, "attention_mask": prepared})


@pytest.mark.parametrize("build", zoo.BUILDS)
def test_pictures_that_do_not_match_the_prompt_are_refused_by_the_model(build):
    """transformers counts placeholders itself; compression neither hides that nor leaves anything behind."""
    model, inputs = zoo.model(build), zoo.inputs(build, zoo.SINGLE)
    wrong = {**inputs, "input_ids": inputs["input_ids"].clone()}
    wrong["input_ids"][0, -1] = zoo.IMAGE
    with winnow.compress(model, Pick(keep=3)):
        expected = generate(model, inputs)
        with pytest.raises(ValueError, match=r"(?i)tokens|placeholders"):
            forward(model, wrong)
        assert same(generate(model, inputs), expected)
