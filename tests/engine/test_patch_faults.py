"""Rows M1–M7 of the list of faults of patching: twice, interrupted, threads, copies, foreign models, versions."""

from __future__ import annotations

import copy
import io
import json
import pickle
import re
import subprocess
import sys
import threading

import pytest
import torch
import transformers
import zoo
from cases import same
from probes import Pick, Probed, Tapped, forward, generate
from snapshot import differences, same_weights, snapshot, weights
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM, LlavaForConditionalGeneration

import winnow
from winnow.core.plan import Plan
from winnow.models import supported_versions


@pytest.mark.parametrize("build", zoo.BUILDS)
def test_M1_compressing_twice_raises_and_the_first_plan_stays(build):
    model, inputs = zoo.model(build), zoo.inputs(build, zoo.RAGGED)
    with winnow.compress(model, Pick(keep=3)) as handle:
        expected = generate(model, inputs)
        attached = snapshot(model)
        for plan in (Pick(keep=3), Tapped(), Pick(keep=5)):
            with pytest.raises(winnow.WinnowError, match=r"compressed already.*detach\(\).*using"):
                winnow.compress(model, plan)
        assert differences(attached, snapshot(model)) == []
        assert same(generate(model, inputs), expected)
        assert handle.attached


@pytest.mark.parametrize("build", zoo.BUILDS)
def test_M1_one_after_the_other_is_fine_and_detaching_twice_does_nothing(build):
    model, inputs = zoo.model(build), zoo.inputs(build, zoo.RAGGED)
    plain, before = generate(model, inputs), snapshot(model)
    for keep in (3, 5):
        handle = winnow.compress(model, Pick(keep=keep))
        forward(model, inputs)
        assert [len(item.kept) for item in handle.last.items] == [keep] * 3
        handle.detach()
        handle.detach()
    assert differences(before, snapshot(model)) == []
    assert same(generate(model, inputs), plain)


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
@pytest.mark.parametrize("build", zoo.BUILDS)
def test_M2_after_an_exception_inside_a_decoding_step_the_next_call_is_right(build, error):
    """In the middle of `generate`, with a half-filled cache: neither the request nor its state is seen again."""
    model, inputs = zoo.model(build), zoo.inputs(build, zoo.RAGGED)
    calls = []

    def third(*args):
        calls.append(1)
        if len(calls) == 3:
            raise error("third step")

    with winnow.compress(model, Probed()):
        expected = generate(model, inputs)
        hook = model.model.language_model.layers[3].register_forward_hook(third)
        with pytest.raises(error, match="third step"):
            generate(model, inputs)
        hook.remove()
        assert same(generate(model, inputs), expected)


@pytest.mark.parametrize("build", zoo.BUILDS)
def test_M3_two_threads_on_one_model_equal_the_same_requests_one_by_one(build):
    """Different pictures, lengths and plans at once, many times; on Qwen the model's own position state is shared."""
    model = zoo.model(build)
    jobs = [
        (zoo.inputs(build, zoo.RAGGED), Pick(keep=5)),
        (zoo.inputs(build, ("2 B 4 C 5", "11"), seed=7), Probed()),
    ]
    rounds = 6
    with winnow.compress(model, Pick(keep=4)) as handle:

        def run(job):
            inputs, plan = job
            with handle.using(plan):
                return generate(model, inputs)

        serial = [run(job) for job in jobs]
        found: list[list] = [[], []]
        start = threading.Barrier(2)

        def work(i):
            for _ in range(rounds):
                start.wait(60)
                found[i].append(run(jobs[i]))

        threads = [threading.Thread(target=work, args=(i,)) for i in range(2)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(120)
    for i in range(2):
        assert len(found[i]) == rounds
        assert all(same(output, serial[i]) for output in found[i])


@pytest.mark.parametrize("build", zoo.BUILDS)
def test_M3_no_state_of_a_request_is_on_the_module(build):
    """While a request is held inside a layer, the model has what it had before it, but for hooks that know no request:
    layers are hooked while some request needs them, and have none before and after."""
    model, inputs = zoo.model(build), zoo.inputs(build, zoo.RAGGED)
    with winnow.compress(model, Tapped()):
        generate(model, inputs)
        idle, during = snapshot(model), []
        probe = model.model.language_model.layers[3].register_forward_hook(lambda *args: during.append(snapshot(model)))
        forward(model, inputs)
        probe.remove()
        assert differences(idle, snapshot(model)) == []
    changed = [line for line in differences(idle, during[0]) if ": hooks" not in line]
    assert changed == []


@pytest.mark.parametrize("build", zoo.BUILDS)
def test_M4_a_deep_copy_of_a_compressed_model_is_a_plain_model(build):
    model, inputs = zoo.model(build), zoo.inputs(build, zoo.RAGGED)
    plain, values = generate(model, inputs), weights(model)
    with winnow.compress(model, Plan((Tapped(), Pick(keep=5)))) as handle:
        reduced = generate(model, inputs)
        other = copy.deepcopy(model)
        ledger = handle.last
        assert same(generate(other, inputs), plain)
        assert handle.last is ledger
        assert same(generate(model, inputs), reduced)
        assert same_weights(weights(other), values)
        with winnow.compress(other, Pick(keep=3)) as second:
            forward(other, inputs)
            assert [len(item.kept) for item in second.last.items] == [3, 3, 3]
        assert same(generate(model, inputs), reduced)
    assert same(generate(other, inputs), plain)


@pytest.mark.parametrize("build", zoo.BUILDS)
def test_M4_a_pickle_of_a_compressed_model_is_a_plain_model(build):
    model, inputs = zoo.model(build), zoo.inputs(build, zoo.RAGGED)
    plain = generate(zoo.model(build), inputs)  # another one: transformers cannot pickle a model that has run
    with winnow.compress(model, Plan((Tapped(), Pick(keep=5)))):
        data = pickle.dumps(model)
        buffer = io.BytesIO()
        torch.save(model, buffer)
    buffer.seek(0)
    for other in (pickle.loads(data), torch.load(buffer, weights_only=False)):
        assert same(generate(other, inputs), plain)


@pytest.mark.parametrize("build", zoo.BUILDS)
def test_M4_saving_a_compressed_model_saves_the_plain_one(build, tmp_path):
    model, inputs = zoo.model(build), zoo.inputs(build, zoo.RAGGED)
    plain = generate(model, inputs)
    model.save_pretrained(tmp_path / "before")
    with winnow.compress(model, Plan((Tapped(), Pick(keep=5)))):
        generate(model, inputs)
        model.save_pretrained(tmp_path / "during")
    for file in (tmp_path / "before").iterdir():
        assert (tmp_path / "during" / file.name).read_bytes() == file.read_bytes()
    assert "winnow" not in json.dumps(json.loads((tmp_path / "during" / "config.json").read_text()))
    again = type(model).from_pretrained(tmp_path / "during").eval()
    again.generation_config = model.generation_config
    assert same(generate(again, inputs), plain)


def _text_model():
    return LlamaForCausalLM(
        LlamaConfig(vocab_size=64, hidden_size=32, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2)
    )


class Foreign(nn.Module):
    """What remote code may bring: some configuration, and none of the seams."""

    def __init__(self):
        super().__init__()
        self.config = type("Config", (), {"model_type": "foreign-vl"})()


@pytest.mark.parametrize("make", [_text_model, Foreign, lambda: nn.Linear(2, 2), lambda: "llava", lambda: None])
def test_M5_other_models_are_refused_with_what_is_supported(make):
    with pytest.raises(winnow.WinnowError) as caught:
        winnow.compress(make(), Tapped())
    if isinstance(make(), nn.Module):
        assert isinstance(caught.value, winnow.UnsupportedError)
        for told in ("is not supported: it", "`winnow families`", "Add a model family"):
            assert told in str(caught.value)


def test_M5_a_model_without_its_head_is_refused():
    """`LlavaModel` has the seams of the family, but nothing can be generated with it."""
    with pytest.raises(winnow.UnsupportedError, match="ForConditionalGeneration"):
        winnow.compress(zoo.model("llava_clip").model, Tapped())


@pytest.mark.parametrize(
    ("build", "path"),
    [
        ("llava_clip", "vision_tower.encoder"),
        ("llava_next", "multi_modal_projector"),
        ("qwen2_5_vl", "visual.merger"),
        ("llava_siglip", "language_model.rotary_emb"),
    ],
)
def test_M6_a_missing_seam_is_named_with_the_version_at_compress(build, path):
    """As if another version of transformers had renamed it: no AttributeError from deep inside, nothing left behind."""
    model = zoo.model(build)
    parent, _, name = path.rpartition(".")
    delattr(model.model.get_submodule(parent), name)
    before = snapshot(model)
    with pytest.raises(winnow.UnsupportedError) as caught:
        winnow.compress(model, Tapped())
    assert name in str(caught.value)
    assert transformers.__version__ in str(caught.value)
    assert "5.19" in str(caught.value)
    assert differences(before, snapshot(model)) == []


@pytest.mark.parametrize("version", ["4.57.1", "5.0.0", "5.18.2", "5.25.0", "5.100.0.dev0", "6.0.0", "nightly"])
def test_M6_a_version_outside_the_tested_range_is_refused_at_compress(monkeypatch, version):
    model = zoo.model("llava_clip")
    # transformers puts itself anew into the table of modules while it loads, so there can be two of it.
    monkeypatch.setattr(supported_versions.transformers, "__version__", version)
    with pytest.raises(winnow.UnsupportedError, match=rf"{re.escape(version)}.*5\.19"):
        winnow.compress(model, Tapped())


ABSENT = ("torchvision", "flash_attn", "gradio", "decord", "datasets", "peft", "accelerate", "av", "vllm", "matplotlib")


def test_M7_compression_works_without_any_optional_package():
    """In a process in which importing them fails, whether they are installed or not."""
    code = f"""
import sys
sys.modules.update(dict.fromkeys({ABSENT!r}))
sys.path[:0] = {[*sys.path]!r}
import torch, zoo, winnow
model, inputs = zoo.model("llava_clip"), zoo.inputs("llava_clip", zoo.RAGGED)
with winnow.compress(model, "fastervlm:keep=5"), torch.no_grad():
    print(model.generate(**inputs, max_new_tokens=2, do_sample=False).shape[0])
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=300)
    assert done.stdout.strip().endswith("3"), done.stderr


def test_M7_a_wrapper_of_peft_is_unwrapped():
    """By its module name and `get_base_model`, so that peft itself is not needed here."""

    class Wrapped(nn.Module):
        def __init__(self, inner: LlavaForConditionalGeneration):
            super().__init__()
            self.inner = inner

        def get_base_model(self):
            return self.inner

        def forward(self, **inputs):
            return self.inner(**inputs)

    Wrapped.__module__ = "peft.peft_model"
    model, inputs = Wrapped(zoo.model("llava_clip")), zoo.inputs("llava_clip", zoo.RAGGED)
    with winnow.compress(model, Pick(keep=3)) as handle:
        forward(model, inputs)
        assert [len(item.kept) for item in handle.last.items] == [3, 3, 3]
