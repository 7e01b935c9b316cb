"""A model whose parts are on several devices: the answers are those on one, and no tensor meets one of another device.

The devices are made up (`tests/devices.py`), so that every machine can run this; accelerate spreads the model over them
as it does over GPUs.
"""

from __future__ import annotations

import functools

import accelerate
import pytest
import torch
import zoo
from cases import CASES, pairs, prolonged, same
from devices import FIRST, SECOND, THIRD, Devices
from probes import Probed, forward, generate, step_logits

import winnow
from winnow.core.registry import method_class, picture_methods

STEPS = 3


def device_map(build, *, tower=FIRST, projector=FIRST, embeddings=FIRST, layers=(FIRST,) * zoo.DEPTH):
    """Where each part goes; the head is with the last layer."""
    lm = "model.language_model"
    places = {f"{lm}.embed_tokens": embeddings, f"{lm}.rotary_emb": embeddings, f"{lm}.norm": layers[-1]}
    places |= {f"{lm}.layers.{i}": device for i, device in enumerate(layers)} | {"lm_head": layers[-1]}
    if build == "qwen2_5_vl":
        places["model.visual"] = tower
    else:
        places |= {"model.vision_tower": tower, "model.multi_modal_projector": projector}
    if build == "llava_next":
        places["model.image_newline"] = FIRST
    return {name: str(device) for name, device in places.items()}


APART = {"tower": SECOND, "projector": THIRD, "layers": (FIRST, SECOND, THIRD, FIRST)}
SPREAD = {
    "two halves": {"layers": (FIRST, FIRST, SECOND, SECOND)},
    "embeddings apart": {"embeddings": SECOND, "layers": (THIRD, FIRST, FIRST, SECOND)},
}


@pytest.fixture(autouse=True)
def devices():
    with Devices():
        yield


def spread(build, **places):
    """A model whose parts accelerate has put on these devices."""
    return accelerate.dispatch_model(zoo.model(build), device_map(build, **places), main_device=str(FIRST), **FORCED)


FORCED = {"force_hooks": True}  # also where all parts are on one device


@functools.cache
def on_one(build):
    return spread(build)


@functools.cache
def apart(build):
    """A model whose parts are all on other devices, and what it says of a batch without a plan."""
    model = spread(build, **APART)
    return model, generate(model, moved(zoo.inputs(build, zoo.MIXED)), STEPS)


def moved(inputs):
    return {name: value.to(str(FIRST)) for name, value in inputs.items()}


def test_devices_do_not_mix():
    """The devices of these tests do what a GPU does."""
    a, b = torch.ones(2, 2).to("maia:0"), torch.arange(2).to("maia:1")
    assert (a.device, b.device, (a + 1).device) == (FIRST, SECOND, FIRST)
    for mix in (lambda: a + b, lambda: a[b], lambda: a.gather(0, b[None]), lambda: torch.cat([a, a.to("maia:1")])):
        with pytest.raises(RuntimeError, match="one device"):
            mix()
    assert a[b.cpu()].device == FIRST  # an index may come from the host
    with pytest.raises(TypeError):
        a.numpy()


def compared(build, plan, several, plain):
    """Generation under a plan on several devices and on one: bit for bit the same, and its ledger as well."""
    inputs, one = moved(zoo.inputs(build, zoo.MIXED)), on_one(build)
    with winnow.compress(one, plan) as first, winnow.compress(several, plan) as second:
        want, found = generate(one, inputs, STEPS), generate(several, inputs, STEPS)
        assert same(found, want)
        assert second.last.layer_tokens == first.last.layer_tokens
        for mine, own in zip(second.last.items, first.last.items, strict=True):
            assert torch.equal(mine.kept.cpu(), own.kept.cpu())
    assert not torch.equal(step_logits(want), step_logits(plain)), "the plan changes nothing here"
    assert same(generate(several, inputs, STEPS), plain)


@pytest.mark.parametrize(("kind", "build"), pairs(("received", "folded", "probed", "forgotten")))
def test_several_devices_answer_as_one(kind, build):
    compared(build, CASES[kind].plan, *apart(build))


@pytest.mark.parametrize("places", SPREAD.values(), ids=SPREAD)
def test_wherever_the_parts_are(places):
    several = spread("llava_clip", **places)
    plain = generate(several, moved(zoo.inputs("llava_clip", zoo.MIXED)), STEPS)
    compared("llava_clip", CASES["probed"].plan, several, plain)


OTHERS = {
    "pixelprune": {"threshold": 0.707, "metric": "rmse"},  # of noise, nothing is equal
    "visual-context-window-extension": {"scale": 2.0},  # a picture is one frame, which stays
}


# What learned methods build is moved by `Module.to`, which cannot move to a device that is made up.
@pytest.mark.parametrize("slug", [entry.slug for entry in picture_methods() if "weights" not in entry.settings])
@pytest.mark.filterwarnings("ignore::winnow.WinnowWarning")
def test_every_method_runs_on_several_devices(slug):
    method = method_class(slug).configured(**OTHERS.get(slug, {}))
    if method.takes_budgets():
        method = method.at_budget(9, zoo.tokens_of("llava_clip", "A"))
    compared("llava_clip", method, *apart("llava_clip"))


@pytest.mark.parametrize("build", zoo.BUILDS)
def test_a_conversation_goes_on_across_devices(build):
    """A later turn on a reduced cache, whose layers are on different devices, in a padded batch."""
    inputs = zoo.inputs(build, zoo.RAGGED)
    answers = []
    for model in (on_one(build), apart(build)[0]):
        with winnow.compress(model, Probed()):
            first = generate(model, moved(inputs), STEPS)
            turn = moved(prolonged(inputs, first.sequences.cpu()))
            answers.append(generate(model, turn, STEPS, past_key_values=first.past_key_values))
    assert same(*answers)


@pytest.mark.parametrize("build", ["llava_clip", "qwen2_5_vl"])
def test_recorded_hidden_states_get_their_length_back(build):
    inputs = moved(zoo.inputs(build, zoo.MIXED))
    states = []
    for model in (on_one(build), apart(build)[0]):
        with winnow.compress(model, Probed()):
            states.append(forward(model, inputs, output_hidden_states=True).hidden_states)
    assert all(torch.equal(a.cpu(), b.cpu()) for a, b in zip(*states, strict=True))
