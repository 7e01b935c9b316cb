"""Prepared inputs: a plain model that reads them says what the compressed model says."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch
import transformers
import zoo
from builds import every
from masked import Cut, MaskedReference
from probes import (
    Folded,
    Halve,
    Pick,
    Received,
    forward,
    generate,
    new_tokens,
    step_logits,
)
from torch import Tensor, nn

import winnow
from winnow.core.plan import Plan
from winnow.models.supported_versions import trying

RAGGED, SINGLE, MIXED = zoo.RAGGED, zoo.SINGLE, zoo.MIXED
TEXT = ("11", "7")
LONG = {"sliding_window": 4096}
ELSEWHERE: dict[str, dict[str, Any]] = {
    "qwen2_vl": LONG,
    "qwen3_5": {},
    "gemma3": LONG,
    "internvl": {},
    "idefics3": {},
    "paligemma": {},
    "mistral3_full": {},
    "llava_onevision": {},
    "ovis2": {},
}
SUBJECTS = (*zoo.BUILDS, *ELSEWHERE)
# Masks in which the tokens of a picture see each other; features that come with more than rows.
UNCUT = ("gemma3", "paligemma", "ovis2")
CHUNKED = hasattr(transformers.generation.utils, "_slice_mm_encoder_output")


@pytest.fixture(autouse=True)
def any_class():
    with trying():
        yield


def model_of(name: str) -> nn.Module:
    return zoo.model(name) if name in zoo.BUILDS else every()[name].model(**ELSEWHERE.get(name, {}))


def samples_of(name: str, rows: Sequence[str]) -> list[dict[str, Tensor]]:
    if name == "idefics3":  # newer releases give features by row, and compress does not read a row without any
        rows = ["3 A 6" if row == "11" and rows != TEXT else row for row in rows]
    return zoo.samples(name, rows) if name in zoo.BUILDS else every()[name].samples(rows)


def batch_of(name: str, rows: Sequence[str], **options: Any) -> dict[str, Tensor]:
    made = samples_of(name, rows)
    return zoo.collate(made, **options) if name in zoo.BUILDS else every()[name].collate(made, **options)


def plans(name: str) -> dict[str, Plan]:
    found = {"picked": Plan((Pick(keep="40%"),)), "merged": Plan((Halve(),)), "twice": Plan((Pick(), Pick(keep=3)))}
    if name in zoo.BUILDS:
        found["received"] = Plan((Received(keep=10),))
    if name in zoo.BUILDS and name != "qwen2_5_vl":
        found["folded"] = Plan((Folded(),))
        found["folded, picked"] = Plan((Folded(), Pick(keep=4)))
    if name == "llava_next":
        found["without newlines"] = Plan((Pick(keep=5, separators="drop"),))
    return found


def cases(*kinds: str) -> list[tuple[str, str]]:
    return [(name, kind) for name in SUBJECTS for kind in (kinds or plans(name)) if kind in plans(name)]


def compressed(model: nn.Module, inputs: dict[str, Tensor], plan: Any, **options: Any) -> tuple[Any, Any]:
    with winnow.compress(model, plan) as handle:
        return generate(model, inputs, **options), handle.last


def check_same(model: nn.Module, inputs: dict[str, Tensor], plan: Any, **options: Any) -> Any:
    """Ids, logits of each step, kept tokens and counts of the plain model on prepared inputs are the engine's."""
    expected, ledger = compressed(model, inputs, plan, **options)
    prepared = winnow.prepare(model, inputs, plan)
    output = generate(model, prepared.inputs, **options)
    assert torch.equal(prepared.restore(output.sequences), expected.sequences)
    assert (step_logits(output) - step_logits(expected)).abs().max() <= 1e-5
    own = prepared.ledger
    assert [(i.row, i.n_visual, i.kept.tolist()) for i in own.items] == [
        (i.row, i.n_visual, i.kept.tolist()) for i in ledger.items
    ]
    for mine, first in zip(own.items, ledger.items, strict=True):
        assert torch.equal(mine.provenance().to_matrix(), first.provenance().to_matrix())
    for name in ("plan", "resolved", "positions", "logical", "layer_tokens", "flops", "flops_full", "notes"):
        assert getattr(own, name) == getattr(ledger, name), name
    return prepared


def batches() -> list[Any]:
    """Every plan on three batches. Of classes outside the zoo the fast suite takes all three for one plan, and the
    mixed batch, with a picture, with none and with two, for the others.
    """
    return [
        pytest.param(name, kind, rows, id=f"{said}-{name}-{kind}", marks=() if fast else pytest.mark.full)
        for said, rows in (("ragged", RAGGED), ("mixed", MIXED), ("single", SINGLE))
        for name, kind in cases()
        for fast in [name in zoo.BUILDS or kind == "picked" or rows == MIXED]
    ]


@pytest.mark.parametrize(("name", "kind", "rows"), batches())
def test_the_plain_model_says_what_the_compressed_model_says(name, kind, rows):
    model, inputs = model_of(name), batch_of(name, rows)
    prepared = check_same(model, inputs, plans(name)[kind])
    assert prepared.width < inputs["input_ids"].shape[1]
    plain = generate(model, inputs, steps=1)
    changed = generate(model, prepared.inputs, steps=1)
    assert (step_logits(plain)[0, 0] - step_logits(changed)[0, 0]).abs().max() > 1e-2, "the plan has no effect"


@pytest.mark.parametrize(("name", "kind"), [(n, k) for n, k in cases() if n in zoo.BUILDS and not n.startswith("qwen")])
def test_compact_positions_are_those_of_the_compressed_model(name, kind):
    plan = plans(name)[kind]
    check_same(model_of(name), batch_of(name, MIXED), Plan(plan.methods, positions="compact"))


@pytest.mark.parametrize("name", SUBJECTS)
def test_text_alone_passes(name):
    model, inputs = model_of(name), batch_of(name, TEXT)
    prepared = check_same(model, inputs, Pick())
    assert prepared.ledger.read_in_full == "no picture came with the request"
    assert prepared.width == inputs["input_ids"].shape[1]


@pytest.mark.parametrize("name", ["qwen2_5_vl", "llava_onevision"])
def test_videos(name):
    letters = "3 V 4 A 5"
    model, inputs = model_of(name), batch_of(name, (letters, "3 A 5"))
    prepared = check_same(model, inputs, Pick(keep=3))
    assert [item.modality for item in prepared.ledger.items] == ["video", "image", "image"]


@pytest.mark.parametrize("name", SUBJECTS)
@pytest.mark.parametrize("keep", ["100%", "full"])
def test_keeping_all_is_bit_identical_to_the_plain_model(name, keep):
    model, inputs = model_of(name), batch_of(name, MIXED)
    prepared = winnow.prepare(model, inputs, "full" if keep == "full" else Pick(keep=keep))
    plain, output = generate(model, inputs), generate(model, prepared.inputs)
    assert torch.equal(plain.sequences, prepared.restore(output.sequences))
    assert torch.equal(step_logits(plain), step_logits(output))
    for part in samples_of(name, SINGLE):
        alone = winnow.prepare(model, part, Pick(keep="100%"))
        assert torch.equal(forward(model, part).logits, forward(model, alone.forward_inputs).logits)


@pytest.mark.parametrize("name", SUBJECTS)
def test_a_plain_forward_gives_the_logits_of_the_first_step(name):
    model, inputs = model_of(name), batch_of(name, RAGGED)
    prepared = winnow.prepare(model, inputs, Pick(keep=5))
    first = step_logits(generate(model, prepared.inputs, steps=1))[:, 0]
    assert (forward(model, prepared.forward_inputs).logits[:, -1] - first).abs().max() <= 1e-5


@pytest.mark.parametrize("name", ["qwen3_vl", "cosmos3_omni"])
def test_classes_that_add_features_at_depth_equal_hidden_keys(name):
    """Deepstack features go with their tokens; the reference is the plain model with the dropped keys hidden."""
    build = every()[name]
    model, reference = build.model(), MaskedReference(build.model())
    parts = build.samples(RAGGED)
    prepared = winnow.prepare(model, build.collate(parts), Pick(keep=5))
    output = generate(model, prepared.inputs)
    said = new_tokens(output, prepared.inputs)
    for row, part in enumerate(parts):
        where = (part["input_ids"][0] == model.config.image_token_id).nonzero()[:, 0]
        kept = where[prepared.ledger.items[row].kept]
        forced = said[row, :-1].tolist()
        hidden = reference.run(part, [where], forced, [Cut(0, lambda rows, left, kept=kept: [kept])])
        assert (step_logits(output)[row] - hidden.logits).abs().max() <= 1e-5
        full = reference.run(part, [where], forced)
        assert (step_logits(output)[row] - full.logits).abs().max() > 1e-2


@pytest.mark.parametrize("name", SUBJECTS)
def test_a_static_cache_gives_the_same(name):
    model, inputs = model_of(name), batch_of(name, RAGGED)
    prepared = winnow.prepare(model, inputs, Pick(keep=5))
    dynamic = generate(model, prepared.inputs)
    options = {"cache_implementation": "static", "disable_compile": True}
    static = generate(model, prepared.inputs, **options)
    assert torch.equal(dynamic.sequences, static.sequences)
    assert (step_logits(dynamic) - step_logits(static)).abs().max() <= 1e-5


@pytest.mark.parametrize("name", SUBJECTS)
@pytest.mark.parametrize("rows", [RAGGED, SINGLE], ids=["ragged", "single"])
def test_chunked_prefill_gives_the_same_or_cannot_be_asked_for(name, rows):
    """Versions before 5.23 hand no picture to any chunk, and some prompts cannot be cut."""
    model, inputs = model_of(name), batch_of(name, rows)
    prepared = winnow.prepare(model, inputs, Pick(keep=5))
    whole = generate(model, prepared.inputs)
    if not CHUNKED or name in UNCUT:
        with pytest.raises(TypeError, match="prefill_chunk_size"):
            model.generate(**prepared.inputs, prefill_chunk_size=4)
        return
    chunked = generate(model, prepared.inputs, prefill_chunk_size=4)
    assert torch.equal(whole.sequences, chunked.sequences)
    assert (step_logits(whole) - step_logits(chunked)).abs().max() <= 1e-5


@pytest.mark.parametrize(("name", "kind"), [c for c in cases("picked", "folded") if c[0] != "qwen3_5"])
def test_beams_and_returned_sequences(name, kind):
    """Not on Qwen3.5: the beams of its plain model do not have the scores of their own tokens."""
    model, inputs = model_of(name), batch_of(name, MIXED)
    options = {"num_beams": 3, "num_return_sequences": 2, "output_scores": True}
    expected, _ = compressed(model, inputs, plans(name)[kind], **options)
    prepared = winnow.prepare(model, inputs, plans(name)[kind])
    output = generate(model, prepared.inputs, **options)
    assert torch.equal(prepared.restore(output.sequences), expected.sequences)
    assert (output.sequences_scores - expected.sequences_scores).abs().max() <= 1e-5
    again = generate(model, prepared.inputs, **options)
    assert torch.equal(again.sequences, output.sequences), "generate has changed the inputs"


@pytest.mark.parametrize("name", ["llava_clip", "qwen2_5_vl", "internvl", "mistral3_full"])
def test_prompt_lookup_gives_the_greedy_tokens(name):
    model, inputs = model_of(name), batch_of(name, ("9 A 9",))
    inputs["input_ids"][0, -9:] = torch.tensor([21, 22, 23]).repeat(3)
    prepared = winnow.prepare(model, inputs, Pick(keep=5))
    greedy = generate(model, prepared.inputs, steps=12)
    looked = generate(model, prepared.inputs, steps=12, prompt_lookup_num_tokens=3)
    assert torch.equal(greedy.sequences, looked.sequences)
    assert (step_logits(greedy) - step_logits(looked)).abs().max() <= 1e-5


@pytest.mark.parametrize("name", SUBJECTS)
def test_without_a_cache(name):
    """Trap 1: without mask and cache, gaps in the positions would be read as the ends of packed samples."""
    model, inputs = model_of(name), batch_of(name, SINGLE)
    prepared = winnow.prepare(model, inputs, Pick(keep=5))
    expected = generate(model, prepared.inputs)
    if not hasattr(model.base_model, "get_rope_index"):
        with pytest.raises(TypeError, match="use_cache"):
            model.generate(**prepared.inputs, use_cache=False)
    without = winnow.prepare(model, inputs, Pick(keep=5), use_cache=False)
    output = generate(model, without.inputs, use_cache=False)
    assert torch.equal(without.restore(output.sequences), prepared.restore(expected.sequences))
    assert (step_logits(output) - step_logits(expected)).abs().max() <= 1e-5
    bare = forward(model, prepared.forward_inputs | {"use_cache": False}).logits[:, -1]
    assert (bare - step_logits(expected)[:, 0]).abs().max() <= 1e-5


@pytest.mark.parametrize("name", SUBJECTS)
def test_max_length_and_labels(name):
    model, inputs = model_of(name), batch_of(name, RAGGED)
    prepared = winnow.prepare(model, inputs, Pick(keep=5))
    width = inputs["input_ids"].shape[1]
    with torch.no_grad():
        output = model.generate(**prepared.inputs, max_length=prepared.max_length(width + 4), do_sample=False)
    assert prepared.restore(output).shape[1] == width + 4
    labels = inputs["input_ids"].masked_fill(inputs["attention_mask"] == 0, -100)
    short = winnow.prepare(model, inputs | {"labels": labels}, Pick(keep=5))
    made = short.forward_inputs["labels"]
    assert torch.equal(made == -100, short.inputs["attention_mask"] == 0)
    assert forward(model, short.forward_inputs).loss.isfinite()
