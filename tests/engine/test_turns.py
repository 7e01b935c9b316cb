"""After the prompt: later turns on the returned cache, stepping by hand, cropping, copies of a cache, new pictures."""

from __future__ import annotations

import copy

import pytest
import torch
import zoo
from byhand import Reference
from cases import SUBSETS, identities, pairs, same
from probes import STEPS, Pick, forward, generate, new_tokens, step_logits
from transformers import DynamicCache

import winnow

PROBES = ("fastervlm", "divprune", "visionzip", "todre", "pyramiddrop")
TURN = torch.randint(10, 200, (3, 5), generator=torch.Generator().manual_seed(3))


def prolonged(inputs, sequences, turn=TURN):
    """The ids and the mask of a conversation: prompt, answer, new turn. No pictures: they are in the cache."""
    ids = torch.cat([sequences, turn], 1)
    new = ids.shape[1] - inputs["input_ids"].shape[1]
    mask = torch.cat([inputs["attention_mask"], torch.ones(len(ids), new, dtype=torch.int64)], 1)
    return {"input_ids": ids, "attention_mask": mask}


@pytest.mark.parametrize(("slug", "build"), pairs(PROBES))
def test_a_second_turn_on_the_cache_equals_by_hand(slug, build):
    """The same as one unbroken run over prompt, answer and new text."""
    model, parts = zoo.model(build), zoo.samples(build, zoo.MIXED)
    inputs, (plan, by_hand) = zoo.collate(parts), SUBSETS[slug]
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
    with winnow.compress(model, "divprune:keep=5"):
        first = generate(model, inputs)
        talk = prolonged(inputs, first.sequences)
        second = generate(model, talk, past_key_values=first.past_key_values)
        whole = {**inputs, **talk}
        if "mm_token_type_ids" in whole:
            whole["mm_token_type_ids"] = (whole["input_ids"] == zoo.IMAGE).int()
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
    with winnow.compress(model, "divprune:keep=5") as handle:
        first = generate(model, first_part)
        talk = prolonged(first_part, first.sequences, new["input_ids"])
        pictures = {k: new[k] for k in ("pixel_values", "image_sizes") if k in new}
        second = generate(model, {**talk, **pictures}, past_key_values=first.past_key_values)
        assert [len(item.kept) for item in handle.last.items] == [5]
        both = {k: (first_part[k], new[k]) for k in pictures}
        one_shot = generate(model, {**talk, **_joined(both)})
        assert [len(item.kept) for item in handle.last.items] == [5, 5]
    assert torch.equal(second.sequences, one_shot.sequences)
    assert (step_logits(second) - step_logits(one_shot)).abs().max() <= 1e-5


def _joined(parts):
    tiles = max(part.shape[1] for part in parts["pixel_values"])
    padded = [
        torch.nn.functional.pad(part, (0, 0) * 3 + (0, tiles - part.shape[1])) if part.ndim == 5 else part
        for part in parts["pixel_values"]
    ]
    return {**{k: torch.cat(v) for k, v in parts.items() if k != "pixel_values"}, "pixel_values": torch.cat(padded)}


def test_a_second_turn_with_a_new_picture_on_qwen_is_the_plain_models_under_identity():
    """transformers numbers a later picture of Qwen2.5-VL like text; that is its own convention, and stays."""
    build = "qwen2_5_vl"
    model = zoo.model(build)
    first_part, new = zoo.sample(build, "3 A 6"), zoo.sample(build, "2 B 4", seed=5)
    pictures = {k: new[k] for k in ("pixel_values", "image_grid_thw")}

    def two_turns():
        first = generate(model, first_part)
        talk = prolonged(first_part, first.sequences, new["input_ids"])
        talk["mm_token_type_ids"] = (talk["input_ids"] == zoo.IMAGE).int()
        return generate(model, {**talk, **pictures}, past_key_values=first.past_key_values)

    plain = two_turns()
    with winnow.compress(model, "divprune:keep=100%"):
        assert same(two_turns(), plain)


@pytest.mark.parametrize("given", ["nothing", "mask", "positions", "mask and positions"])
@pytest.mark.parametrize(("slug", "build"), pairs(PROBES))
def test_stepping_by_hand_equals_generate(slug, build, given):
    """`model(next_token, past_key_values=…)`, with or without the mask and the positions that `generate` would pass.

    A left-padded batch needs its mask, as it does without compression; so here rows are of equal length.
    """
    model, inputs = zoo.model(build), zoo.inputs(build, ("3 A 6", "3 A 6"))
    width = inputs["input_ids"].shape[1]
    with winnow.compress(model, SUBSETS[slug][0]):
        expected = generate(model, inputs)
        said = new_tokens(expected, inputs)
        output = forward(model, inputs, use_cache=True)
        logits = [output.logits[:, -1]]
        next_position = _next_position(build, model, inputs)
        for step in range(STEPS - 1):
            options = {}
            if "mask" in given:
                options["attention_mask"] = torch.ones(2, width + step + 1, dtype=torch.int64)
            if "positions" in given:
                options["position_ids"] = next_position + step
            token = {"input_ids": said[:, step : step + 1]}
            output = forward(model, token, past_key_values=output.past_key_values, use_cache=True, **options)
            logits.append(output.logits[:, -1])
    assert (torch.stack(logits, 1) - step_logits(expected)).abs().max() <= 1e-5


def _next_position(build, model, inputs):
    """Where the first new token stands: `[B, 1]`, or `[3, B, 1]`."""
    if build != "qwen2_5_vl":
        return torch.full((2, 1), inputs["input_ids"].shape[1])
    names = ("input_ids", "attention_mask", "mm_token_type_ids", "image_grid_thw")
    positions, _ = model.model.get_rope_index(**{k: inputs[k] for k in names})
    return positions.amax((0, 2))[None, :, None].expand(3, -1, -1) + 1


@pytest.mark.parametrize(("slug", "build"), pairs(PROBES))
def test_stepping_by_hand_over_a_padded_batch_with_its_mask_equals_generate(slug, build):
    model, inputs = zoo.model(build), zoo.inputs(build, zoo.RAGGED)
    with winnow.compress(model, SUBSETS[slug][0]):
        expected = generate(model, inputs)
        said = new_tokens(expected, inputs)
        output = forward(model, inputs, use_cache=True)
        logits, mask = [output.logits[:, -1]], inputs["attention_mask"]
        for step in range(STEPS - 1):
            mask = torch.cat([mask, mask.new_ones(3, 1)], 1)
            token = {"input_ids": said[:, step : step + 1], "attention_mask": mask}
            output = forward(model, token, past_key_values=output.past_key_values, use_cache=True)
            logits.append(output.logits[:, -1])
    assert (torch.stack(logits, 1) - step_logits(expected)).abs().max() <= 1e-5


@pytest.mark.parametrize(("slug", "build"), pairs(("divprune", "pyramiddrop")))
def test_several_tokens_at_once_equal_one_by_one(slug, build):
    model, inputs = zoo.model(build), zoo.inputs(build, zoo.SINGLE)
    with winnow.compress(model, SUBSETS[slug][0]):
        together = forward(model, inputs, use_cache=True)
        apart = forward(model, inputs, use_cache=True)
        at_once = forward(model, {"input_ids": TURN[:1]}, past_key_values=together.past_key_values).logits
        one_by_one = [
            forward(model, {"input_ids": TURN[:1, i : i + 1]}, past_key_values=apart.past_key_values).logits
            for i in range(TURN.shape[1])
        ]
    assert (at_once - torch.cat(one_by_one, 1)).abs().max() <= 1e-5


@pytest.mark.parametrize(("slug", "build"), pairs(("divprune", "pyramiddrop")))
def test_the_cache_tells_logical_lengths_and_holds_physical_ones(slug, build):
    model, inputs = zoo.model(build), zoo.inputs(build, zoo.RAGGED)
    with winnow.compress(model, SUBSETS[slug][0]) as handle:
        cache = generate(model, inputs).past_key_values
        held = [layer.keys.shape[2] for layer in cache.layers]
        assert held == [max(counts) + STEPS - 1 for counts in handle.last.layer_tokens]
    assert cache.get_seq_length() == inputs["input_ids"].shape[1] + STEPS - 1


@pytest.mark.parametrize(("slug", "build"), pairs(("divprune", "pyramiddrop")))
def test_a_cropped_cache_goes_on_from_where_it_was_cut(slug, build):
    """What speculative decoding does: several tokens in, some of them out again, others in."""
    model, inputs = zoo.model(build), zoo.inputs(build, zoo.RAGGED)
    width = inputs["input_ids"].shape[1]
    mask = torch.cat([inputs["attention_mask"], torch.ones(3, 5, dtype=torch.int64)], 1)

    def put(cache, start, end):
        new = {"input_ids": TURN[:, start:end], "attention_mask": mask[:, : cache.get_seq_length() + end - start]}
        return forward(model, new, past_key_values=cache).logits

    with winnow.compress(model, SUBSETS[slug][0]):
        straight = forward(model, inputs, use_cache=True).past_key_values
        expected = put(straight, 0, 2), put(straight, 2, 3)
        cache = forward(model, inputs, use_cache=True).past_key_values
        put(cache, 0, 5)
        cache.crop(-3)
        assert cache.get_seq_length() == width + 2
        assert (put(cache, 2, 3) - expected[1]).abs().max() <= 1e-5
        cache.crop(-3)
        assert cache.get_seq_length() == width
        assert (put(cache, 0, 2) - expected[0]).abs().max() <= 1e-5
        cache.crop(0)
        assert cache.get_seq_length() == width + 2


@pytest.mark.parametrize("build", zoo.BUILDS)
def test_a_cache_can_be_cropped_down_to_the_last_picture_and_no_further(build):
    """Text behind the last picture is whole in every layer; of what stands before, some tokens are gone."""
    model, inputs = zoo.model(build), zoo.sample(build, "3 A 6")
    with winnow.compress(model, Pick(keep=3, at="layers[1]")):
        cache = forward(model, inputs, use_cache=True).past_key_values
        cache.crop(-4)
        again = forward(model, {"input_ids": inputs["input_ids"][:, -4:]}, past_key_values=cache).logits[:, -1]
        assert (again - forward(model, inputs).logits[:, -1]).abs().max() <= 1e-5
        for count in (8, 20):
            with pytest.raises(winnow.WinnowError, match="crop"):
                cache.crop(-count)
        assert cache.get_seq_length() == inputs["input_ids"].shape[1]


@pytest.mark.parametrize(("slug", "build"), pairs(("divprune", "pyramiddrop")))
def test_copies_of_a_cache_go_on_by_themselves(slug, build):
    """One prompt, several questions: each continues a copy, and none sees the others."""
    model, inputs = zoo.model(build), zoo.inputs(build, zoo.RAGGED)
    with winnow.compress(model, SUBSETS[slug][0]):
        first = generate(model, inputs, steps=2)
        saved = copy.deepcopy(first.past_key_values)
        other = torch.flip(TURN, [1])
        talks = [prolonged(inputs, first.sequences, turn) for turn in (TURN, other)]
        straight = [generate(model, t, past_key_values=copy.deepcopy(saved)) for t in talks]
        mixed = [copy.deepcopy(saved) for _ in talks]
        for talk, cache, expected in zip(talks, mixed, straight, strict=True):
            assert same(generate(model, talk, past_key_values=cache), expected)
    assert not torch.equal(new_tokens(straight[0], talks[0]), new_tokens(straight[1], talks[1]))


@pytest.mark.parametrize(("slug", "build"), pairs(("divprune", "pyramiddrop")))
def test_two_requests_step_by_turns_under_one_plan(slug, build):
    """State is on the caches: on Qwen, where the model keeps position offsets on itself, too."""
    model = zoo.model(build)
    parts = [zoo.sample(build, "3 A 6"), zoo.sample(build, "5 B 4 C 3", seed=4)]
    with winnow.compress(model, SUBSETS[slug][0]):
        expected = [generate(model, part) for part in parts]
        outputs = [forward(model, part, use_cache=True) for part in parts]
        logits = [[output.logits[:, -1]] for output in outputs]
        for step in range(STEPS - 1):
            for i, part in enumerate(parts):
                token = {"input_ids": new_tokens(expected[i], part)[:, step : step + 1]}
                outputs[i] = forward(model, token, past_key_values=outputs[i].past_key_values)
                logits[i].append(outputs[i].logits[:, -1])
    for found, output in zip(logits, expected, strict=True):
        assert (torch.stack(found, 1) - step_logits(output)).abs().max() <= 1e-5


@pytest.mark.parametrize("build", zoo.BUILDS)
def test_a_cache_that_was_reset_starts_anew(build):
    model, inputs = zoo.model(build), zoo.inputs(build, zoo.RAGGED)
    with winnow.compress(model, Pick(keep=3)):
        expected = generate(model, inputs)
        cache = expected.past_key_values
        cache.reset()
        assert cache.get_seq_length() == 0
        assert same(generate(model, inputs, past_key_values=cache), expected)


@pytest.mark.parametrize("build", zoo.BUILDS)
def test_an_empty_cache_of_the_caller_is_filled(build):
    model, inputs = zoo.model(build), zoo.inputs(build, zoo.RAGGED)
    with winnow.compress(model, "pyramiddrop") as handle:
        expected = generate(model, inputs)
        cache = DynamicCache(config=model.config.get_text_config())
        assert same(generate(model, inputs, past_key_values=cache), expected)
        assert cache.get_seq_length() == expected.sequences.shape[1] - 1
        assert [layer.keys.shape[2] for layer in cache.layers] == [
            max(counts) + STEPS - 1 for counts in handle.last.layer_tokens
        ]


@pytest.mark.parametrize("plan", ["divprune:keep=5", "pyramiddrop"])
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
