"""DyVTE by its card: the first router that fires lets all visual tokens of a sample leave, there and nowhere else."""

from __future__ import annotations

import functools

import numpy as np
import pytest
import torch
import zoo
from byhand import Reference, cut
from probes import Look
from torch import nn

import winnow
from winnow.bench.intervals import paired
from winnow.bench.requests import without_pixels
from winnow.core.errors import WinnowError
from winnow.core.info import ModelInfo
from winnow.core.packing import Packing
from winnow.core.step import Observe, Reduce, State
from winnow.core.view import View
from winnow.methods.dyvte import DyVTE, Routers
from winnow.signals.entering import TextSummary
from winnow.signals.language import LMEntry, TextSpans
from winnow.testing import run_step

from .directional import gap
from .stubs import tokens

LLAMA = ModelInfo(depth=8, width=6)
BUILDS = ("llava_clip", "qwen2_5_vl")


@pytest.mark.system("dyvte", "exact")
@pytest.mark.parametrize("build", BUILDS)
@pytest.mark.parametrize("layer", [1, 3])
def test_a_forced_exit_is_the_model_with_vision_masked_in_later_layers(build, layer):
    """Same positions; layers before it keep the image in the cache, for decoding as well."""
    model, sample = zoo.model(build), zoo.samples(build, ("3 A 6",))[0]
    reference = Reference(model)
    with winnow.compress(model, DyVTE(exit=layer)), torch.no_grad():
        options = {"output_logits": True, "return_dict_in_generate": True, "do_sample": False}
        said = model.generate(**sample, max_new_tokens=3, min_new_tokens=3, **options)
    entry = reference.entry(sample)
    trace = reference.run(
        entry,
        said.sequences[0, sample["input_ids"].shape[1] :][:-1].tolist(),
        {layer: cut(entry, lambda number, rows, seen: rows[:0])},
    )
    assert (torch.cat(said.logits) - trace.logits).abs().max() <= 1e-5
    assert trace.lengths[layer] < trace.lengths[0] == trace.lengths[layer - 1]


@pytest.mark.system("dyvte", "exact")
def test_never_is_the_full_model_bit_for_bit():
    model, sample = zoo.model("llava_clip"), zoo.samples("llava_clip", ("3 A 6",))[0]
    with torch.no_grad():
        plain = model(**sample).logits
        with winnow.compress(model, DyVTE(exit="never")):
            assert torch.equal(model(**sample).logits, plain)


def _routers(*leave: float) -> nn.Module:
    """Routers that read the first channel of the mean: each fires where it is above its threshold."""
    routers = Routers(LLAMA.width, len(leave) + 1, 2)
    for router, least in zip(routers.children(), leave, strict=True):
        for matrix in (router[0].weight, router[2].weight):
            nn.init.zeros_(matrix)
        with torch.no_grad():
            router[0].weight[:, 0] = 1
            router[2].weight[1, 0] = 1.0 if least < torch.inf else -1.0
    return routers


def _act(module, layer, text):
    step = DyVTE().bind(LLAMA)[1][layer - 1]
    view = View.of(tokens(0, 5, 6, b=len(text)), {TextSummary(layer, width=6): text, TextSummary(layer): text})
    object.__setattr__(view, "module", module)
    return step.act(view, State())[0], view


@pytest.mark.system("dyvte", "exact")
def test_a_sample_leaves_where_the_second_logit_is_larger():
    text = torch.zeros(3, 12)
    text[:, 0] = torch.tensor([3.0, -0.1, 0.0])  # GELU of −0.1 is below 0, and equal logits do not fire
    module = _routers(*[0.0] * 7)
    action, _ = _act(module, 2, text)
    assert isinstance(action, Reduce)
    assert action.reduction.counts == (0, 5, 5)
    action, _ = _act(module, 2, text[1:])
    assert isinstance(action, Observe)
    action, _ = _act(_routers(*[torch.inf] * 7), 2, text[:1])
    assert isinstance(action, Observe)


def test_text_that_is_broken_fires_no_router_and_is_counted():
    text = torch.full((2, 12), torch.nan)
    action, view = _act(_routers(*[0.0] * 7), 1, text)
    assert isinstance(action, Observe)
    assert int(view.notes["nan_scores"]) == 2


def test_the_summary_is_of_the_text_behind_the_image():
    model, (sample,) = zoo.model("llava_clip"), zoo.samples("llava_clip", ("3 A 6",))
    reference = Reference(model)
    look = Look(needs=(TextSummary(2),), at="layers[2]")
    with winnow.compress(model, look), torch.no_grad():
        model(**sample)
        seen = look.seen(TextSummary(2))
    entry = reference.entry(sample)
    rows = reference.run(entry).layers[2].hidden[0, int(entry.items[-1][-1]) + 1 :]
    assert (seen[0] - torch.cat([rows[:-1].mean(0), rows[-1]])).abs().max() <= 1e-5


@pytest.mark.system("dyvte", "exact")
def test_as_released_the_router_reads_what_the_code_reads():
    """The code takes tokens 35 … 611 for the image: the mean of all behind it but the last, then the last."""
    hidden = torch.randn(1, 640, 8, generator=torch.Generator().manual_seed(0))
    mask = torch.ones(1, 640, dtype=torch.bool)
    seen = LMEntry(hidden, Packing.of(mask, (640,)), TextSpans([(611, 640)], [611], [torch.arange(35, 611)]))
    code = torch.cat([hidden[:, 35 + 576 : -1].mean(1), hidden[:, -1]], -1)
    assert (TextSummary(3).read(seen) - code).abs().max() <= 1e-6


def test_a_layer_that_does_not_exist_and_a_signal_that_comes_too_late_are_refused():
    model = zoo.model("llava_clip")
    with pytest.raises(WinnowError, match="exit=9"):
        winnow.compress(model, DyVTE(exit=9))
    with pytest.raises(WinnowError, match="sees what enters layer 2 only"):
        winnow.compress(model, Look(needs=(TextSummary(1),), at="layers[2]"))
    with pytest.raises(WinnowError, match="has not run by then"):
        winnow.compress(model, Look(needs=(TextSummary(3),), at="layers[2]"))
    with pytest.raises(WinnowError, match="learned, never"):
        DyVTE(exit="soon")
    with pytest.raises(WinnowError, match="trained for another model"):
        winnow.compress(model, "dyvte")


def test_plain_arrays_keep_all_where_text_says_nothing():
    found = run_step("dyvte:hidden=8", LLAMA, tokens(0, 7, 6), torch.zeros(1, 12))
    assert found.kept[0].tolist() == list(range(7))


UNTRAINED = "dyvte:weights=untrained,hidden=128"


def exits(sample, plan) -> np.ndarray:
    """The layer before which each question's picture leaves; the depth, where it stays."""
    found = []
    for own, batch, encoded in sample.encoded(winnow.Plan.of(plan)):
        with sample.handle.using(plan), torch.no_grad():
            sample.handle.model(
                **without_pixels(batch), mm_encoder_outputs={"image": encoded.under(winnow.Plan.of(plan))}
            )
            layers = torch.tensor(sample.handle.last.layer_tokens)  # layers, rows
        found += [int((layers[:, row] == layers[0, row]).sum()) for row in range(len(own))]
    return np.array(found)


@functools.cache  # two tests ask
def exits_of_trained(sample) -> np.ndarray:
    return exits(sample, "dyvte")


@pytest.mark.system("dyvte", "directional")
@pytest.mark.xdist_group("samples")
def test_trained_routers_keep_more_answers_than_untrained_ones(sample):
    trained, untrained = sample.right("dyvte"), sample.right(UNTRAINED)
    assert gap(trained, untrained).low > 0
    assert paired(untrained > 0, trained > 0).low > 0
    assert exits_of_trained(sample).mean() < sample.handle.info.depth


@pytest.mark.system("dyvte", "directional")
@pytest.mark.xdist_group("samples")
def test_trained_routers_keep_more_answers_than_fixed_exits_of_the_same_mean_depth(sample):
    """The mean lies between two layers; a fixed exit at either, in the shares that give this mean."""
    below, above = divmod(exits_of_trained(sample).mean(), 1)
    early, late = (sample.right(f"dyvte:exit={int(below) + more}") for more in (0, 1))
    assert gap(sample.right("dyvte"), (1 - above) * early + above * late).low > 0
