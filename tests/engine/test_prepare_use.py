"""Prepared inputs in use: compiled models, buckets, servers, threads; nothing is left on the model; what is refused."""

from __future__ import annotations

import threading
from typing import Any

import pytest
import torch
import zoo
from builds import every
from probes import Call, Drawn, Folded, Halve, Pick, Received, Tapped, forward, generate, step_logits
from snapshot import differences, same_weights, snapshot, weights
from torch import nn
from torch._dynamo.testing import CompileCounter

import winnow
from winnow.core.method import Method
from winnow.core.plan import Plan
from winnow.models.supported_versions import trying


@pytest.fixture(autouse=True)
def any_class():
    with trying():
        yield


# The language models of the LLaVA builds are one class: the fast suite compiles that of LLaVA with CLIP, and Qwen's.
COMPILED = [
    pytest.param(build, marks=() if build in ("llava_clip", "qwen2_5_vl") else pytest.mark.full) for build in zoo.BUILDS
]
# And of the towers CLIP's, SigLIP's and Qwen2.5-VL's.
TOWERS = [pytest.param(build, marks=pytest.mark.full if build == "llava_next" else ()) for build in zoo.BUILDS]


@pytest.fixture
def fresh_compiler():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def compiled(model: nn.Module) -> CompileCounter:
    """Compile the language model in place, in one graph or not at all; counts the graphs."""
    counter = CompileCounter()
    model.get_decoder().compile(backend=counter, fullgraph=True, dynamic=False)
    return counter


def requests(build: str) -> list[dict[str, torch.Tensor]]:
    return [
        zoo.sample(build, row, seed=i)
        for i, row in enumerate(("3 A 6", "2 B 9", "9 A 12", "4 C 3", "2 A 2 B 3", "5 A 7"))
    ]


@pytest.mark.parametrize("build", COMPILED)
def test_the_language_model_compiles_in_one_graph_for_each_bucket(build, fresh_compiler):
    plain, model = zoo.model(build), zoo.model(build)
    counter = compiled(model)
    widths = set()
    for inputs in requests(build):
        prepared = winnow.prepare(model, inputs, Pick(keep=6), bucket=16)
        widths.add(prepared.width)
        logits = forward(model, prepared.forward_inputs | {"use_cache": False}).logits[:, -1]
        with winnow.compress(plain, Pick(keep=6)):
            expected = forward(plain, inputs).logits[:, -1]
        assert (logits - expected).abs().max() <= 1e-5
    assert all(width % 16 == 0 for width in widths)
    assert 1 <= counter.frame_count <= len(widths) < len(requests(build))


@pytest.mark.parametrize("build", COMPILED)
def test_a_compiled_model_with_a_static_cache(build, fresh_compiler):
    """One graph for the prefill of each bucket and one for all decoded tokens.

    The widest comes first: `generate` keeps its static cache, and makes a longer one only where it must.
    """
    plain, model = zoo.model(build), zoo.model(build)
    counter = compiled(model)
    made = [(winnow.prepare(model, x, Pick(keep=6), bucket=[16, 32, 64]), x) for x in requests(build)]
    for prepared, inputs in sorted(made, key=lambda pair: -pair[0].width):
        output = generate(model, prepared.inputs, steps=4, cache_implementation="static", disable_compile=True)
        with winnow.compress(plain, Pick(keep=6)):
            expected = generate(plain, inputs, steps=4)
        assert torch.equal(prepared.restore(output.sequences), expected.sequences)
        assert (step_logits(output) - step_logits(expected)).abs().max() <= 1e-5
    widths = {prepared.width for prepared, _ in made}
    assert 2 <= counter.frame_count <= len(widths) + 1


@pytest.mark.parametrize("build", TOWERS)
def test_a_model_wrapped_by_torch_compile_and_one_with_a_compiled_tower(build, fresh_compiler):
    inputs = zoo.inputs(build, zoo.RAGGED)
    expected = winnow.prepare(zoo.model(build), inputs, Received(keep=5))
    wrapped = torch.compile(zoo.model(build), backend="eager")
    inside = zoo.model(build)
    tower = "visual" if build == "qwen2_5_vl" else "vision_tower"
    setattr(inside.model, tower, torch.compile(getattr(inside.model, tower), backend="eager"))
    for model in (wrapped, inside):
        made = winnow.prepare(model, inputs, Received(keep=5))
        assert torch.equal(made.inputs["input_ids"], expected.inputs["input_ids"])
        assert [i.kept.tolist() for i in made.ledger.items] == [i.kept.tolist() for i in expected.ledger.items]


@pytest.mark.parametrize("build", zoo.BUILDS)
@pytest.mark.parametrize(("bucket", "widths"), [(8, range(8, 800, 8)), ([40, 26, 64], (26, 40, 64))])
def test_buckets_pad_and_change_nothing(build, bucket, widths):
    model, inputs = zoo.model(build), zoo.inputs(build, zoo.MIXED)
    plain, padded = (winnow.prepare(model, inputs, Pick(keep=5), bucket=b) for b in (None, bucket))
    assert padded.width == min(width for width in widths if width >= plain.width) > plain.width
    a, b = generate(model, plain.inputs), generate(model, padded.inputs)
    assert torch.equal(plain.restore(a.sequences), padded.restore(b.sequences))
    assert (step_logits(a) - step_logits(b)).abs().max() <= 1e-5
    assert plain.sizes == padded.sizes == padded.ledger.layer_tokens[0]


@pytest.mark.parametrize("build", [*zoo.BUILDS, "internvl", "qwen3_vl"])
def test_requests_of_a_server_are_grouped_by_compressed_width(build):
    rows = ("3 A 6", "11", "2 B 9", "2 A 4 B 5", "3 A 9", "7")
    made = zoo if build in zoo.BUILDS else every()[build]
    model = zoo.model(build) if made is zoo else made.model()
    parts = zoo.samples(build, rows) if made is zoo else made.samples(rows)
    batches = winnow.prepare_many(model, parts, Pick(keep=4), bucket=8, batch=2)
    assert sorted(number for batch in batches for number in batch.requests) == list(range(len(parts)))
    assert all(len(batch.requests) <= 2 and batch.width % 8 == 0 for batch in batches)
    assert any(len(batch.requests) == 2 for batch in batches)
    for batch in batches:
        output = generate(model, batch.inputs, num_return_sequences=2, num_beams=2)
        for row, number in enumerate(batch.requests):
            alone = winnow.prepare(model, parts[number], Pick(keep=4))
            expected = alone.restore(generate(model, alone.inputs, num_return_sequences=2, num_beams=2).sequences)
            own = batch.restore(output.sequences)[2 * row : 2 * row + 2]
            assert torch.equal(own[:, own.shape[1] - expected.shape[1] :], expected)
            assert batch.sizes[row] == alone.sizes[0]
            kept = [item.kept.tolist() for item in batch.ledger.items if item.row == row]
            assert kept == [item.kept.tolist() for item in alone.ledger.items]
            assert batch.ledger.logical[row] == alone.ledger.logical[0]
    assert sum(batch.ledger.flops for batch in batches) == sum(
        winnow.prepare(model, part, Pick(keep=4)).ledger.flops for part in parts
    )


class Broken(RuntimeError):
    pass


def fail(view: Any) -> None:
    raise Broken


@pytest.mark.parametrize("build", zoo.BUILDS)
def test_nothing_is_left_on_the_model(build):
    """Not an attribute, a hook or a buffer; also not after a method, or the encoder, has failed."""
    model, inputs = zoo.model(build), zoo.inputs(build, zoo.RAGGED)
    before, held = snapshot(model), weights(model)
    own = {name: dict(module.__dict__) for name, module in model.named_modules()}
    tried: list[Method] = [Pick(keep=5), Received(keep=5), Halve()] + ([Folded()] if build != "qwen2_5_vl" else [])
    for method in tried:
        winnow.prepare(model, inputs, method)
    with pytest.raises(Broken):
        winnow.prepare(model, inputs, Call(fail))
    with pytest.raises(Exception, match=r".+"):
        winnow.prepare(model, inputs | {"pixel_values": inputs["pixel_values"][..., :3]}, Pick())
    assert not differences(before, snapshot(model))
    assert {name: module.__dict__.keys() for name, module in model.named_modules()} == {
        name: attributes.keys() for name, attributes in own.items()
    }
    assert same_weights(held, weights(model))


@pytest.mark.parametrize("build", zoo.BUILDS)
def test_other_threads_use_the_model_while_it_is_prepared_for(build):
    """Two plans at once, while a third thread generates with the plain model in the middle of both."""
    model, inputs = zoo.model(build), zoo.inputs(build, zoo.RAGGED)
    plain = generate(model, inputs)
    expected = {k: winnow.prepare(model, inputs, Pick(keep=k)).inputs["input_ids"] for k in (3, 7)}
    inside, done, errors = threading.Barrier(3, timeout=60), threading.Event(), []

    def wait(view: Any) -> None:
        inside.wait()
        assert done.wait(60)

    def run(keep: int) -> None:
        try:
            methods = (Call(wait), Pick(keep=keep))
            with trying():
                made = winnow.prepare(model, single, Plan(methods))
            assert made.ledger.items[0].kept.shape == (keep,)
        except BaseException as error:
            errors.append(error)

    single = zoo.inputs(build, zoo.SINGLE)
    threads = [threading.Thread(target=run, args=(keep,)) for keep in (3, 7)]
    for thread in threads:
        thread.start()
    inside.wait()
    output = generate(model, inputs)
    done.set()
    for thread in threads:
        thread.join()
    assert not errors
    assert torch.equal(output.sequences, plain.sequences)
    assert torch.equal(step_logits(output), step_logits(plain))
    for keep, ids in expected.items():
        assert torch.equal(winnow.prepare(model, inputs, Pick(keep=keep)).inputs["input_ids"], ids)


def test_the_plan_draws_what_it_draws_under_compress():
    model, inputs = zoo.model("llava_clip"), zoo.inputs("llava_clip", zoo.RAGGED)
    with winnow.compress(model, Drawn(keep=5)) as handle:
        forward(model, inputs)
        kept = [item.kept.tolist() for item in handle.last.items]
    state = torch.random.get_rng_state()
    prepared = winnow.prepare(model, inputs, Drawn(keep=5))
    assert torch.equal(state, torch.random.get_rng_state())
    assert [item.kept.tolist() for item in prepared.ledger.items] == kept


def test_weights_that_are_exchanged_are_seen():
    model, inputs = zoo.model("llava_clip"), zoo.inputs("llava_clip", zoo.RAGGED)
    first = winnow.prepare(model, inputs, Received(keep=5))
    model.model.multi_modal_projector.linear_1.weight = nn.Parameter(
        torch.zeros_like(model.model.multi_modal_projector.linear_1.weight)
    )
    second = winnow.prepare(model, inputs, Received(keep=5))
    name = lambda made: torch.cat(list(made.inputs["mm_encoder_outputs"]["image"].pooler_output))  # noqa: E731
    assert not torch.equal(name(first), name(second))
    with winnow.compress(model, Received(keep=5)):
        expected = forward(model, inputs).logits[:, -1]
    assert (forward(model, second.forward_inputs).logits[:, -1] - expected).abs().max() <= 1e-5


@pytest.mark.parametrize("padding", ["left", "right"])
def test_padding_of_either_side_is_made_anew_on_the_left(padding):
    model, parts = zoo.model("llava_clip"), zoo.samples("llava_clip", zoo.RAGGED)
    made = winnow.prepare(model, zoo.collate(parts, side=padding, extra=3), Pick(keep=5))
    expected = winnow.prepare(model, zoo.collate(parts), Pick(keep=5))
    assert torch.equal(made.inputs["input_ids"], expected.inputs["input_ids"])
    assert torch.equal(made.inputs["attention_mask"], expected.inputs["attention_mask"])
    assert torch.equal(made.inputs["position_ids"], expected.inputs["position_ids"])


def test_tokens_that_the_mask_hides_are_no_candidates():
    model, inputs = zoo.model("llava_clip"), zoo.inputs("llava_clip", zoo.RAGGED)
    inputs["attention_mask"][0, 8:14] = 0
    with winnow.compress(model, Pick(keep=5)) as handle:
        expected, ledger = generate(model, inputs), handle.last
    prepared = winnow.prepare(model, inputs, Pick(keep=5))
    output = generate(model, prepared.inputs)
    assert [i.kept.tolist() for i in prepared.ledger.items] == [i.kept.tolist() for i in ledger.items]
    assert (step_logits(output) - step_logits(expected)).abs().max() <= 1e-5


REFUSED = {
    "a step inside": (Pick(at="layers[2]"), {}, r"layers\[2\].*compress"),
    "a look inside": (Tapped(), {}, "acts inside the language model or looks at it"),
    "embeddings": (Pick(), {"inputs_embeds": torch.zeros(1, 3, 64)}, "pass input_ids"),
    "encoded before": (Pick(), {"mm_encoder_outputs": {}}, "pass the pixels"),
    "a cache": (Pick(), {"past_key_values": object()}, "pass the whole conversation"),
    "a prepared mask": (Pick(), {"attention_mask": torch.ones(1, 1, 4, 4)}, "of the shape of input_ids"),
    "no ids": (Pick(), {"input_ids": None}, "takes input_ids"),
    "no pixels": (Pick(), {"pixel_values": None}, "hold no pixel_values"),
}


@pytest.mark.parametrize("reason", REFUSED)
def test_refused_with_what_to_do(reason):
    plan, changed, message = REFUSED[reason]
    with pytest.raises(winnow.WinnowError, match=message):
        winnow.prepare(zoo.model("llava_clip"), zoo.sample("llava_clip", "3 A 6") | changed, plan)


def test_an_unknown_per_token_input_is_refused():
    inputs = zoo.sample("llava_clip", "3 A 6")
    strange = {"speaker_ids": torch.zeros_like(inputs["input_ids"])}
    with pytest.raises(winnow.UnsupportedError, match="speaker_ids"):
        winnow.prepare(zoo.model("llava_clip"), inputs | strange, Pick())


def test_padding_without_a_mask_is_refused():
    inputs = zoo.inputs("llava_clip", zoo.MIXED)
    with pytest.raises(winnow.WinnowError, match="no attention_mask"):
        winnow.prepare(zoo.model("llava_clip"), {k: v for k, v in inputs.items() if k != "attention_mask"}, Pick())


def test_a_prompt_longer_than_a_window_is_refused():
    build = every()["gemma3"]
    with pytest.raises(winnow.UnsupportedError, match=r"sliding_attention over 12 tokens.*winnow\.compress"):
        winnow.prepare(build.model(), build.sample("3 A 6"), Pick())
    winnow.prepare(build.model(), build.sample("3 A 6"), "full")
    winnow.prepare(build.model(), build.sample("9"), Pick())


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("hyperclovax_vision_v2", "leaves out the positions"),
        ("kosmos_2", "pictures are placed inside its language model"),
        ("qwen4_exp", "by the places of keys in the cache"),
    ],
)
def test_classes_that_cannot_are_refused(name, message):
    build = every()[name]
    with pytest.raises(winnow.UnsupportedError, match=message):
        winnow.prepare(build.model(), build.sample("3 A 6"), Pick())


def test_a_prompt_that_ends_in_a_picture():
    """What is generated would stand behind the last kept token, not behind the prompt."""
    model, inputs = zoo.model("llava_clip"), zoo.sample("llava_clip", "3 A")
    inputs = {k: v[:, :-1] if v.ndim == 2 else v for k, v in inputs.items()}  # without the mark behind the picture
    winnow.prepare(model, inputs, Pick(keep="100%"))
    with pytest.raises(winnow.UnsupportedError, match="ends in a picture"):
        winnow.prepare(model, inputs, Pick(keep=1))
    winnow.prepare(model, inputs, Plan((Pick(keep=1),), positions="compact"))


def test_a_compressed_model_is_refused_and_refuses_prepared_inputs():
    model, inputs = zoo.model("llava_clip"), zoo.sample("llava_clip", "3 A 6")
    prepared = winnow.prepare(model, inputs, Pick(keep=5))
    plain = generate(model, prepared.inputs)
    with winnow.compress(model, Pick(keep=5)) as handle:
        with pytest.raises(winnow.WinnowError, match="this model is compressed"):
            winnow.prepare(model, inputs, Pick(keep=5))
        with pytest.raises(winnow.WinnowError, match="before the model was compressed"):
            generate(model, prepared.inputs)
        with handle.using("full"):
            assert torch.equal(generate(model, prepared.inputs).sequences, plain.sequences)


@pytest.mark.parametrize(
    ("options", "message"),
    [({"bucket": 0}, "bucket=0"), ({"bucket": [4, 8]}, "too narrow"), ({"bucket": True}, "bucket=True")],
)
def test_buckets_that_cannot_be(options, message):
    with pytest.raises(winnow.WinnowError, match=message):
        winnow.prepare(zoo.model("llava_clip"), zoo.sample("llava_clip", "3 A 6"), Pick(), **options)


def test_restore_takes_only_what_these_inputs_gave():
    prepared = winnow.prepare(zoo.model("llava_clip"), zoo.inputs("llava_clip", zoo.RAGGED), Pick(keep=5))
    for shape in ((2, 90), (3, 4)):
        with pytest.raises(winnow.WinnowError, match="restore takes"):
            prepared.restore(torch.zeros(shape, dtype=torch.int64))
