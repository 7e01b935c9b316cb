"""Later turns on the returned cache, with and without new pictures."""

from __future__ import annotations

import pytest
import torch
import zoo
from byhand import Reference
from cases import CASES, SOME, identities, pairs, prolonged, same
from probes import STEPS, Pick, Probed, generate, step_logits

import winnow


@pytest.mark.parametrize(("kind", "build"), pairs(SOME))
def test_a_second_turn_on_the_cache_equals_by_hand(kind, build):
    """The same as one unbroken run over prompt, answer and new text."""
    model, parts = zoo.model(build), zoo.samples(build, zoo.MIXED)
    inputs, (plan, by_hand) = zoo.collate(parts), CASES[kind]
    reference = Reference(model)
    with winnow.compress(model, plan):
        first = generate(model, inputs)
        talk = prolonged(inputs, first.sequences)
        second = generate(model, talk, past_key_values=first.past_key_values)
    for row, part in enumerate(parts):
        worked = by_hand(reference, part, reference.entry(part))
        said = second.sequences[row, inputs["input_ids"].shape[1] : -1].tolist()
        trace = reference.run(worked.entry, said, worked.cuts)
        assert (step_logits(second)[row] - trace.logits[-STEPS:]).abs().max() <= 1e-5


@pytest.mark.parametrize("build", zoo.BUILDS)
def test_a_second_turn_equals_one_shot(build):
    """What does not look at the text chooses the same for the whole conversation as for its first turn."""
    model, parts = zoo.model(build), zoo.samples(build, zoo.MIXED)
    inputs = zoo.collate(parts)
    with winnow.compress(model, Pick(keep=5)):
        first = generate(model, inputs)
        talk = prolonged(inputs, first.sequences)
        second = generate(model, talk, past_key_values=first.past_key_values)
        whole = {**inputs, **talk}
        if "mm_token_type_ids" in whole:
            whole["mm_token_type_ids"] = zoo.token_types(whole["input_ids"])
        one_shot = generate(model, whole)
    assert torch.equal(second.sequences, one_shot.sequences)
    assert (step_logits(second) - step_logits(one_shot)).abs().max() <= 1e-5


@pytest.mark.parametrize("build", zoo.BUILDS)
def test_a_second_turn_under_identity_is_bit_identical(build):
    model, inputs = zoo.model(build), zoo.inputs(build, zoo.MIXED)
    first = generate(model, inputs)
    talk = prolonged(inputs, first.sequences)
    plain = generate(model, talk, past_key_values=first.past_key_values)
    for plan in identities(build):
        with winnow.compress(model, plan):
            first = generate(model, inputs)
            assert same(generate(model, talk, past_key_values=first.past_key_values), plain), plan


@pytest.mark.parametrize("build", ["llava_clip", "llava_siglip", "llava_next"])
def test_a_second_turn_with_a_new_picture_equals_one_shot(build):
    model = zoo.model(build)
    first_part, new = zoo.sample(build, "3 A 6"), zoo.sample(build, "2 B 4", seed=5)
    with winnow.compress(model, Pick(keep=5)) as handle:
        first = generate(model, first_part)
        talk = prolonged(first_part, first.sequences, new["input_ids"])
        pictures = {k: new[k] for k in ("pixel_values", "image_sizes") if k in new}
        second = generate(model, {**talk, **pictures}, past_key_values=first.past_key_values)
        assert [len(item.kept) for item in handle.last.items] == [5]
        one_shot = generate(model, {**talk, **zoo.joined([first_part, new])})
        assert [len(item.kept) for item in handle.last.items] == [5, 5]
    assert torch.equal(second.sequences, one_shot.sequences)
    assert (step_logits(second) - step_logits(one_shot)).abs().max() <= 1e-5


def test_a_second_turn_with_a_new_picture_on_qwen_is_the_plain_models_under_identity():
    """How transformers numbers a later picture is its own convention, and stays: like text, since 5.23 by its grid."""
    build = "qwen2_5_vl"
    model = zoo.model(build)
    first_part, new = zoo.sample(build, "3 A 6"), zoo.sample(build, "2 B 4", seed=5)
    pictures = {k: new[k] for k in ("pixel_values", "image_grid_thw")}

    def two_turns():
        first = generate(model, first_part)
        talk = prolonged(first_part, first.sequences, new["input_ids"])
        # Only the new picture has pixels and a grid; since 5.23 the types of all tokens are matched with the grids.
        old = torch.zeros_like(first.sequences)
        talk["mm_token_type_ids"] = torch.cat([old, zoo.token_types(new["input_ids"])], 1)
        return generate(model, {**talk, **pictures}, past_key_values=first.past_key_values)

    plain = two_turns()
    with winnow.compress(model, Pick(keep="100%")):
        assert same(two_turns(), plain)


@pytest.mark.parametrize("plan", [Pick(keep=5), Probed()])
@pytest.mark.parametrize("build", ["llava_clip", "llava_siglip", "llava_next"])
def test_a_first_picture_in_the_second_turn_equals_one_shot(build, plan):
    """The cache holds plain text of ragged rows, padding included; only then comes something to reduce."""
    model = zoo.model(build)
    texts = zoo.collate([zoo.sample(build, row) for row in ("5", "9", "7")])
    news = [zoo.sample(build, "2 A 4", seed=seed) for seed in range(3)]
    new = zoo.collate(news)
    pictures = {k: new[k] for k in ("pixel_values", "image_sizes") if k in new}
    with winnow.compress(model, plan):
        first = generate(model, texts)
        talk = prolonged(texts, first.sequences, new["input_ids"])
        second = generate(model, {**talk, **pictures}, past_key_values=first.past_key_values)
        one_shot = generate(model, {**talk, **pictures})
    assert torch.equal(second.sequences, one_shot.sequences)
    assert (step_logits(second) - step_logits(one_shot)).abs().max() <= 1e-5
