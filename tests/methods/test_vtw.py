"""VTW: nothing of a picture goes beyond a layer, and the search for that layer."""

from __future__ import annotations

import math

import pytest
import torch
import zoo
from byhand import Reference, cut
from torch import Tensor

import winnow
from winnow.core.errors import UnsupportedError, WinnowError
from winnow.core.info import ModelInfo
from winnow.core.plan import Plan
from winnow.core.step import State
from winnow.core.view import View
from winnow.methods.vtw import VTW

from .directional import at_random, blind_cuts, evenly, gap
from .stubs import tokens

LLAMA = ModelInfo(model="Llama", depth=32)


@pytest.mark.system("vtw", "exact")
@pytest.mark.parametrize("n", [576, 30, 1])
def test_nothing_is_left(n):
    (step,) = VTW().checked_steps(LLAMA)
    view = View.of(tokens(0, n, b=2), n_visual=n)
    reduction = step.act(view, State())[0].reduction
    assert (step.needs, reduction.n, reduction.m) == ((), n, 0)
    assert reduction.apply(view.tokens).shape == (2, 0, 16)


@pytest.mark.system("vtw", "exact")
@pytest.mark.parametrize(
    ("layer", "depth", "at"),
    [(0.5, 32, 16), (0.5, 27, 13), (0.5, 1, 0), (15, 32, 15), (0.25, 8, 2), (1.0, 8, 7), (1, 8, 1), (0, 8, 0)],
)
def test_the_layer_is_a_number_or_a_share_of_the_depth(layer, depth, at):
    (step,) = VTW(layer=layer).checked_steps(ModelInfo(depth=depth))
    assert str(step.at) == f"layers[{at}]"


@pytest.mark.parametrize("layer", [-1, 1.5, True, None, "late"])
def test_wrong_layers(layer):
    with pytest.raises(WinnowError, match="allowed"):
        VTW(layer=layer)


def test_layer_beyond_the_model_is_refused():
    with pytest.raises(WinnowError, match=r"32 LM layers.*0 … 31"):
        VTW(layer=32).checked_steps(LLAMA)


def test_it_has_no_budget():
    with pytest.raises(UnsupportedError, match="no setting `keep`"):
        VTW().at_budget(32, 576)


@pytest.mark.system("vtw", "exact")
@pytest.mark.parametrize("build", ["llava_clip", "llava_next", "qwen2_5_vl"])
@pytest.mark.parametrize("positions", ["keep", "compact"])
def test_later_layers_read_the_text_alone_when_decoding_too(build, positions):
    """As released: layers before keep the image in the cache, and decoded tokens go on at their true positions."""
    if (build, positions) == ("qwen2_5_vl", "compact"):
        pytest.skip("positions in three dimensions are not numbered anew")
    model, (sample,) = zoo.model(build), zoo.samples(build, ("3 A 6",))
    plan = Plan.of(f"vtw:released,layer=2 | positions={positions}")
    options = {"output_logits": True, "return_dict_in_generate": True, "do_sample": False}
    with winnow.compress(model, plan) as handle, torch.no_grad():
        said = model.generate(**sample, max_new_tokens=3, min_new_tokens=3, **options)
        ledger = handle.last
    reference = Reference(model)
    entry = reference.entry(sample)
    forced = said.sequences[0, sample["input_ids"].shape[1] :][:-1].tolist()
    withdrawn = {2: cut(entry, lambda number, rows, seen: rows[:0])}
    trace = reference.run(entry, forced, withdrawn, compact=positions == "compact")
    assert (torch.cat(said.logits) - trace.logits).abs().max() <= 1e-5
    whole = sample["input_ids"].shape[1]
    text = whole - int((sample["input_ids"] == zoo.IMAGE).sum())
    assert list(trace.lengths) == [whole, whole, text, text]
    assert [layer[0] for layer in ledger.layer_tokens] == [whole, whole, text, text]


def from_layer(*divergences: float):
    """Logits of two samples: those whose withdrawal before layer k diverges by so much from the whole model."""

    def run(method: VTW | None) -> Tensor:
        if method is None:
            return torch.zeros(2, 2)
        if method.layer >= len(divergences):
            raise WinnowError(f"layer={method.layer}: there are {len(divergences)} layers.")
        return torch.tensor([[0.0, divergences[method.layer]], [0.0, 0.0]])

    return run


def naive(logits: list[float], whole: list[float]) -> float:
    """KL divergence of the first from the second, as the released code has it."""
    p, q = ([math.exp(x) / sum(map(math.exp, row)) for x in row] for row in (logits, whole))
    return sum(a * (math.log(a) - math.log(b)) for a, b in zip(p, q, strict=True))


@pytest.mark.system("vtw", "exact")
def test_the_search_ends_at_the_first_layer_within_eta():
    logits = (3.0, 2.0, 1.0, 0.2, 0.1, 0.3, 0.0)
    means = [naive([0.0, x], [0.0, 0.0]) / 2 for x in logits]
    run = from_layer(*logits)
    for eta in (0.2, 0.1, 0.003, 0.001, 1e-6):
        want = next(layer for layer, mean in enumerate(means) if layer and mean <= eta)
        assert VTW().calibrate(run, eta=eta).layer == want
    assert VTW().calibrate(run, eta=1e-3, first=5).layer == 6
    assert VTW().calibrate(run, eta=10.0).layer == 1


@pytest.mark.system("vtw", "exact")
def test_the_divergence_is_of_the_withdrawn_from_the_whole():
    """It is not symmetric; this direction is the code's."""
    whole, found = [0.0, 4.0, 1.0], [0.0, 0.0, 2.0]
    forth, back = naive(found, whole), naive(whole, found)
    assert abs(forth - back) > 0.1
    run = lambda method: torch.tensor([whole if method is None else found])  # noqa: E731
    assert VTW().calibrate(run, eta=forth + 1e-5).layer == 1
    calls = iter([torch.tensor([whole]), torch.tensor([found]), torch.tensor([whole])])
    assert VTW().calibrate(lambda method: next(calls), eta=forth - 1e-5).layer == 2


def test_a_search_without_an_end_says_so():
    with pytest.raises(WinnowError, match=r"vtw: eta=0\.0; allowed: .* It ended there: layer=3: there are 3 layers"):
        VTW().calibrate(from_layer(1.0, 1.0, 1.0), eta=0.0)


def test_half_precision_is_compared_in_full():
    run = from_layer(3.0, 0.25, 0.125)
    half = lambda method: run(method).bfloat16()  # noqa: E731
    assert VTW().calibrate(half, eta=0.002).layer == VTW().calibrate(run, eta=0.002).layer == 2


def test_the_search_on_a_model():
    """The search of the header, with nothing but what is public."""
    model, (sample,) = zoo.model("llava_clip"), zoo.samples("llava_clip", ("3 A 6",))
    with winnow.compress(model, Plan(())) as handle, torch.no_grad():

        def run(method):
            with handle.using(Plan((method,) if method else ())):
                return model(**sample).logits[:, -1]

        reference = Reference(model)
        entry = reference.entry(sample)
        whole = reference.run(entry).logits[0].tolist()
        far = []
        for layer in (1, 2, 3):
            withdrawn = {layer: cut(entry, lambda number, rows, seen: rows[:0])}
            far.append(naive(reference.run(entry, cuts=withdrawn).logits[0].tolist(), whole))
        assert VTW().calibrate(run, eta=max(far) * 1.01).layer == 1
        last = next(layer for layer, x in enumerate(far, 1) if x <= min(far) * 1.01)
        assert VTW().calibrate(run, eta=min(far) * 1.01).layer == last
        with pytest.raises(WinnowError, match="has 4 LM layers"):
            VTW().calibrate(run, eta=0.0)


def _text_has_read_by_then(sample, before):
    """Most questions are answered without the picture in the last quarter of the layers, and few without the rest."""
    assert gap(sample.right(before(6)), sample.right(before(2))).low > 0.5
    assert sample.right(before(6)).mean() > 0.9


@pytest.mark.system("vtw", "directional")
@pytest.mark.xdist_group("samples")
def test_text_has_read_the_picture_by_the_last_layers(few):
    _text_has_read_by_then(few, lambda layer: VTW(layer=layer))


@pytest.mark.xdist_group("samples")
@pytest.mark.parametrize("stub", [evenly, at_random])
def test_reading_fails_for_a_stub(few, stub):
    """As many tokens in the mean over layers, in all of them."""
    with pytest.raises(AssertionError):
        _text_has_read_by_then(few, lambda layer: blind_cuts(stub, (0,), (32 * layer,)))
