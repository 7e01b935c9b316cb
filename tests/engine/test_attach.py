"""Attaching and detaching: nothing is left, whatever happened in between, and nothing else is touched."""

from __future__ import annotations

import copy
import gc
import queue
import subprocess
import sys
import threading
import weakref
from dataclasses import dataclass

import pytest
import torch
import transformers
import zoo
from cases import CASES, SOME, pairs, same
from probes import Call, Pick, Probed, Tapped, forward, generate
from snapshot import differences, same_weights, snapshot, weights

import winnow
from winnow.core.plan import Plan
from winnow.core.reduction import Reduction
from winnow.core.step import Reduce


@pytest.mark.parametrize(("kind", "build"), pairs(SOME))
def test_detach_leaves_nothing(kind, build):
    model, inputs = zoo.model(build), zoo.inputs(build, zoo.MIXED)
    plain = generate(model, inputs)
    before, values = snapshot(model), weights(model)
    handle = winnow.compress(model, CASES[kind].plan)
    assert differences(before, snapshot(model))
    generate(model, inputs)
    handle.detach()
    assert differences(before, snapshot(model)) == []
    assert same_weights(values, weights(model))
    assert same(generate(model, inputs), plain)


def fail(error):
    """A hook that raises."""

    def raising(*args):
        raise error("inside")

    return raising


@pytest.mark.parametrize("build", zoo.BUILDS)
def test_the_context_manager_detaches_also_after_an_exception(build):
    model, inputs = zoo.model(build), zoo.inputs(build, zoo.RAGGED)
    plain = generate(model, inputs)
    before = snapshot(model)
    hook = model.lm_head.register_forward_hook(fail(RuntimeError))
    with pytest.raises(RuntimeError, match="inside"), winnow.compress(model, Tapped()):
        generate(model, inputs)
    hook.remove()
    assert differences(before, snapshot(model)) == []
    assert same(generate(model, inputs), plain)


@pytest.mark.parametrize("build", zoo.BUILDS)
def test_nothing_outside_the_model_is_patched(build):
    """Classes and functions of transformers are as before while a plan is attached, and other models run plain."""
    model, other, inputs = zoo.model(build), zoo.model(build), zoo.inputs(build, zoo.RAGGED)
    plain = generate(other, inputs)
    classes = {type(module) for module in model.modules()}
    state = {cls: dict(vars(cls)) for cls in classes}
    modules = [transformers.masking_utils, transformers.cache_utils, transformers.generation.utils]
    functions = {module: dict(vars(module)) for module in modules}
    with winnow.compress(model, Pick(keep=3)):
        generate(model, inputs)
        assert all(dict(vars(cls)) == state[cls] for cls in classes)
        assert all(dict(vars(module)) == functions[module] for module in modules)
        assert same(generate(other, inputs), plain)


@pytest.mark.parametrize("build", zoo.BUILDS)
def test_hooks_of_the_user_stay_and_run(build):
    """Also those that were there before, and those that look at hidden states as the first argument of a layer."""
    model, inputs = zoo.model(build), zoo.inputs(build, zoo.SINGLE)
    with winnow.compress(model, Pick(keep=3)) as handle:
        forward(model, inputs)
        full, short = handle.last.logical[0], handle.last.layer_tokens[2][0]
    layer = model.model.language_model.layers[2]
    widths: list[int] = []
    first = layer.register_forward_pre_hook(lambda module, args: widths.append(args[0].shape[1]))
    handle = winnow.compress(model, Pick(keep=3))
    second = layer.register_forward_pre_hook(lambda module, args: widths.append(args[0].shape[1]))
    forward(model, inputs)
    handle.detach()
    assert widths == [short, short]
    forward(model, inputs)
    assert widths == [short, short, full, full]
    first.remove()
    second.remove()


class Interrupted(BaseException):
    """Not an Exception: what KeyboardInterrupt is, and SystemExit."""


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt, Interrupted])
@pytest.mark.parametrize("place", ["tower", "layer", "head"])
@pytest.mark.parametrize("build", zoo.BUILDS)
def test_an_error_inside_a_forward_leaves_nothing(build, place, error):
    """The next call is right, detaching leaves nothing, and the model is then the plain one."""
    model, inputs = zoo.model(build), zoo.inputs(build, zoo.RAGGED)
    plain = generate(model, inputs, steps=2)
    before = snapshot(model)
    tower = model.model.visual.blocks[2] if build == "qwen2_5_vl" else model.model.vision_tower.encoder.layers[2]
    module = {"tower": tower, "layer": model.model.language_model.layers[2], "head": model.lm_head}[place]

    handle = winnow.compress(model, Tapped())
    expected = generate(model, inputs, steps=2)
    for call in (generate, forward):
        hook = module.register_forward_hook(fail(error))
        with pytest.raises(error, match="inside"):
            call(model, inputs)
        hook.remove()
        text = zoo.inputs(build, ("5", "7"))
        forward(model, text)
        assert same(generate(model, inputs, steps=2), expected)
    handle.detach()
    assert differences(before, snapshot(model)) == []
    assert same(generate(model, inputs, steps=2), plain)


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
@pytest.mark.parametrize("build", zoo.BUILDS)
def test_an_error_inside_a_method_leaves_nothing(build, error):
    model, inputs = zoo.model(build), zoo.inputs(build, zoo.RAGGED)
    plain = generate(model, inputs)
    before = snapshot(model)
    for point in ("projected", "layers[2]"):
        with winnow.compress(model, Call(function=fail(error), at=point)) as handle:
            with pytest.raises(error, match="inside"):
                generate(model, inputs)
            with handle.using(Pick(keep="100%")):
                assert same(generate(model, inputs), plain)
    assert differences(before, snapshot(model)) == []
    assert same(generate(model, inputs), plain)


@pytest.mark.parametrize("place", [None, "tower", "layer"])
@pytest.mark.parametrize("build", zoo.BUILDS)
def test_parts_of_the_model_that_are_called_alone_are_plain(build, place):
    """The language model, a layer and the tower by themselves: also after a request, or an interrupted one."""
    model, inputs = zoo.model(build), zoo.inputs(build, zoo.RAGGED)
    lm, hidden = model.model.language_model, torch.randn(2, 9, 64, generator=torch.Generator().manual_seed(1))
    rope = lm.rotary_emb(hidden, torch.arange(9).expand(3, 1, -1) if build == "qwen2_5_vl" else torch.arange(9)[None])

    @torch.no_grad()
    def alone():
        layers = [layer(hidden, position_embeddings=rope, attention_mask=None) for layer in lm.layers]
        return [*layers, lm(inputs_embeds=hidden).last_hidden_state]

    plain = alone()
    tower = model.model.visual if build == "qwen2_5_vl" else model.model.vision_tower
    with winnow.compress(model, Plan((Pick(keep=3), Tapped(keep=2)))):
        for call in (forward, generate):
            if place is None:
                call(model, inputs)
            else:
                hook = {"tower": tower, "layer": lm.layers[2]}[place].register_forward_hook(fail(KeyboardInterrupt))
                with pytest.raises(KeyboardInterrupt):
                    call(model, inputs)
                hook.remove()
            assert all(torch.equal(a, b) for a, b in zip(alone(), plain, strict=True))


@pytest.mark.parametrize("build", zoo.BUILDS)
def test_nothing_of_a_request_is_kept_but_its_ledger(build):
    """Hidden states, encoder outputs and caches of a finished request are freed, also after an interrupted one."""
    model, inputs = zoo.model(build), zoo.inputs(build, zoo.RAGGED)
    seen: list[weakref.ref] = []

    def note(module, args, output):
        seen.append(weakref.ref(output if isinstance(output, torch.Tensor) else output[0]))

    hooks = [layer.register_forward_hook(note) for layer in model.model.language_model.layers]
    with winnow.compress(model, Probed()) as handle:
        forward(model, inputs)
        hooks.append(model.model.language_model.norm.register_forward_hook(fail(KeyboardInterrupt)))
        with pytest.raises(KeyboardInterrupt):
            forward(model, inputs)
        for hook in hooks:
            hook.remove()
        gc.collect()
        assert len(seen) == 2 * zoo.DEPTH
        assert all(ref() is None for ref in seen)
        assert handle.last is not None


def test_a_refused_plan_leaves_nothing():
    model = zoo.model("llava_siglip")
    before = snapshot(model)
    for plan in ("visionzip:keep=5", "fastv:layer=99", "no-such-method", "fastervlm:keep=5 | positions=odd"):
        with pytest.raises(winnow.WinnowError):
            winnow.compress(model, plan)
        assert differences(before, snapshot(model)) == []
    winnow.compress(model, Tapped()).detach()


def test_detach_twice_is_detach_once():
    model = zoo.model("llava_clip")
    before = snapshot(model)
    handle = winnow.compress(model, Tapped())
    handle.detach()
    handle.detach()
    assert differences(before, snapshot(model)) == []
    assert not handle.attached


def test_an_old_handle_does_not_detach_a_new_one():
    model, inputs = zoo.model("llava_clip"), zoo.inputs("llava_clip", zoo.RAGGED)
    old = winnow.compress(model, Pick(keep=3))
    old.detach()
    with winnow.compress(model, Pick(keep=5)) as new:
        old.detach()
        forward(model, inputs)
        assert [len(item.kept) for item in new.last.items] == [5, 5, 5]


def test_a_detached_handle_says_so():
    handle = winnow.compress(zoo.model("llava_clip"), Tapped())
    handle.detach()
    with pytest.raises(winnow.WinnowError, match="detached"), handle.using(Pick(keep=3)):
        pass
    assert "detached" in repr(handle)


class Inside:
    """A request that another thread runs, held inside a module until it is released."""

    def __init__(self, model, inputs, module):
        self.entered, self.leave, self.result = threading.Event(), threading.Event(), queue.Queue()
        self.hook = module.register_forward_hook(self._wait)
        self.thread = threading.Thread(target=lambda: self.result.put(generate(model, inputs)), name="request")
        self.thread.start()
        assert self.entered.wait(30)

    def _wait(self, *args):
        if threading.current_thread() is self.thread:
            self.entered.set()
            assert self.leave.wait(30)

    def finish(self):
        self.leave.set()
        self.thread.join(30)
        self.hook.remove()
        return self.result.get(timeout=30)


@pytest.mark.parametrize("place", ["layer", "tower"])
@pytest.mark.parametrize("build", zoo.BUILDS)
def test_detaching_under_a_running_request_raises_and_changes_nothing(build, place):
    """Also while `generate` encodes its pictures, before it has entered the model's forward."""
    model, inputs = zoo.model(build), zoo.inputs(build, zoo.RAGGED)
    tower = model.model.visual.blocks[2] if build == "qwen2_5_vl" else model.model.vision_tower.encoder.layers[2]
    handle = winnow.compress(model, Pick(keep=3))
    expected = generate(model, inputs)
    running = Inside(model, inputs, tower if place == "tower" else model.model.language_model.layers[1])
    try:
        with pytest.raises(winnow.WinnowError, match=r"request.*running"):
            handle.detach()
        assert handle.attached
    finally:
        output = running.finish()
    assert same(output, expected)
    handle.detach()
    assert not handle.attached


def test_a_thread_that_was_interrupted_but_lives_on_does_not_block_detaching():
    """A worker of a pool whose request ended with KeyboardInterrupt is not inside the model any more."""
    model, inputs = zoo.model("llava_clip"), zoo.inputs("llava_clip", zoo.RAGGED)
    handle = winnow.compress(model, Pick(keep=3))
    hook = model.model.language_model.layers[1].register_forward_hook(
        lambda *args: (_ for _ in ()).throw(KeyboardInterrupt)
    )
    failed, leave = threading.Event(), threading.Event()

    def work():
        try:
            forward(model, inputs)
        except KeyboardInterrupt:
            failed.set()
        leave.wait(30)

    thread = threading.Thread(target=work)
    thread.start()
    assert failed.wait(30)
    try:
        handle.detach()
    finally:
        leave.set()
        thread.join()
        hook.remove()


@pytest.mark.parametrize(("kind", "build"), pairs(("picked", "tapped")))
def test_a_reduced_cache_does_not_go_on_without_its_plan(kind, build):
    """The plain model would count positions and masks wrongly without a word."""
    model, inputs = zoo.model(build), zoo.inputs(build, zoo.RAGGED)
    with winnow.compress(model, CASES[kind].plan):
        output = generate(model, inputs)
    token = {"input_ids": output.sequences[:, -1:]}
    with pytest.raises(winnow.WinnowError, match="no longer compressed"):
        forward(model, token, past_key_values=output.past_key_values)
    talk = {"input_ids": torch.cat([output.sequences, output.sequences[:, -3:]], 1)}
    with pytest.raises(winnow.WinnowError, match="no longer compressed"):
        generate(model, talk, past_key_values=output.past_key_values)


@pytest.mark.parametrize("build", zoo.BUILDS)
def test_a_reduced_cache_goes_on_when_the_model_is_compressed_again(build):
    """As the message of the refusal says."""
    model, inputs = zoo.model(build), zoo.inputs(build, zoo.RAGGED)
    mask = torch.cat([inputs["attention_mask"], torch.ones(3, 6, dtype=torch.int64)], 1)
    with winnow.compress(model, Pick(keep=3)):
        first = generate(model, inputs)
        step = {"input_ids": first.sequences[:, -1:], "attention_mask": mask}
        saved = copy.deepcopy(first.past_key_values)
        expected = forward(model, step, past_key_values=saved).logits
    with winnow.compress(model, Pick(keep=3)):
        found = forward(model, step, past_key_values=first.past_key_values).logits
    assert torch.equal(found, expected)


def test_compress_does_not_import_what_it_does_not_need():
    """`import winnow` alone brings in neither torch nor transformers."""
    code = "import sys, winnow; print([m for m in ('torch', 'transformers') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_two_classes_with_one_slug_and_the_same_settings_are_two_plans():
    """As a variant of a method that is tried beside it: the plan's key alone does not tell them apart."""

    @dataclass(frozen=True)
    class Other(Pick):
        def _pick(self, view, state):
            return Reduce(Reduction.select(torch.arange(view.n - 3, view.n).expand(view.b, 3), view.n)), state

    model, inputs = zoo.model("llava_clip"), zoo.inputs("llava_clip", zoo.SINGLE)
    assert Plan.of(Other(keep=3)).key == Plan.of(Pick(keep=3)).key
    with winnow.compress(model, Pick(keep=3)) as handle:
        forward(model, inputs)
        first = handle.last.items[0].kept
        with handle.using(Other(keep=3)):
            forward(model, inputs)
        assert handle.last.items[0].kept.tolist() == [22, 23, 24]
        assert first.tolist() != [22, 23, 24]
