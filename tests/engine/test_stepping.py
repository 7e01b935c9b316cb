"""A reduced cache in the caller's hands: stepped, cropped, copied, reordered, reset; it tells logical lengths."""

from __future__ import annotations

import copy

import pytest
import torch
import zoo
from cases import CASES, SOME, TURN, pairs, prolonged, same
from probes import STEPS, Pick, Probed, forward, generate, new_tokens, step_logits
from transformers import DynamicCache

import winnow


@pytest.mark.parametrize("given", ["nothing", "mask", "positions", "mask and positions"])
@pytest.mark.parametrize(("kind", "build"), pairs(SOME))
def test_stepping_by_hand_equals_generate(kind, build, given):
    """`model(next_token, past_key_values=…)`, with or without the mask and the positions that `generate` would pass.

    A left-padded batch needs its mask, as it does without compression; so here rows are of equal length.
    """
    model, inputs = zoo.model(build), zoo.inputs(build, ("3 A 6", "3 A 6"))
    width = inputs["input_ids"].shape[1]
    with winnow.compress(model, CASES[kind].plan):
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


@pytest.mark.parametrize(("kind", "build"), pairs(SOME))
def test_stepping_by_hand_over_a_padded_batch_with_its_mask_equals_generate(kind, build):
    model, inputs = zoo.model(build), zoo.inputs(build, zoo.RAGGED)
    with winnow.compress(model, CASES[kind].plan):
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


@pytest.mark.parametrize(("kind", "build"), pairs(("picked", "probed")))
def test_several_tokens_at_once_equal_one_by_one(kind, build):
    model, inputs = zoo.model(build), zoo.inputs(build, zoo.SINGLE)
    with winnow.compress(model, CASES[kind].plan):
        together = forward(model, inputs, use_cache=True)
        apart = forward(model, inputs, use_cache=True)
        at_once = forward(model, {"input_ids": TURN[:1]}, past_key_values=together.past_key_values).logits
        one_by_one = [
            forward(model, {"input_ids": TURN[:1, i : i + 1]}, past_key_values=apart.past_key_values).logits
            for i in range(TURN.shape[1])
        ]
    assert (at_once - torch.cat(one_by_one, 1)).abs().max() <= 1e-5


@pytest.mark.parametrize(("kind", "build"), pairs(("picked", "probed")))
def test_the_cache_tells_logical_lengths_and_holds_physical_ones(kind, build):
    model, inputs = zoo.model(build), zoo.inputs(build, zoo.RAGGED)
    with winnow.compress(model, CASES[kind].plan) as handle:
        cache = generate(model, inputs).past_key_values
        held = [layer.keys.shape[2] for layer in cache.layers]
        assert held == [max(counts) + STEPS - 1 for counts in handle.last.layer_tokens]
    assert cache.get_seq_length() == inputs["input_ids"].shape[1] + STEPS - 1


@pytest.mark.parametrize(("kind", "build"), pairs(("picked", "probed")))
def test_a_cropped_cache_goes_on_from_where_it_was_cut(kind, build):
    """What speculative decoding does: several tokens in, some of them out again, others in."""
    model, inputs = zoo.model(build), zoo.inputs(build, zoo.RAGGED)
    width = inputs["input_ids"].shape[1]
    mask = torch.cat([inputs["attention_mask"], torch.ones(3, 5, dtype=torch.int64)], 1)

    def put(cache, start, end):
        new = {"input_ids": TURN[:, start:end], "attention_mask": mask[:, : cache.get_seq_length() + end - start]}
        return forward(model, new, past_key_values=cache).logits

    with winnow.compress(model, CASES[kind].plan):
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


@pytest.mark.parametrize(("kind", "build"), pairs(("picked", "probed")))
def test_copies_of_a_cache_go_on_by_themselves(kind, build):
    """One prompt, several questions: each continues a copy, and none sees the others."""
    model, inputs = zoo.model(build), zoo.inputs(build, zoo.RAGGED)
    with winnow.compress(model, CASES[kind].plan):
        first = generate(model, inputs, steps=2)
        saved = copy.deepcopy(first.past_key_values)
        other = torch.flip(TURN, [1])
        talks = [prolonged(inputs, first.sequences, turn) for turn in (TURN, other)]
        straight = [generate(model, t, past_key_values=copy.deepcopy(saved)) for t in talks]
        mixed = [copy.deepcopy(saved) for _ in talks]
        for talk, cache, expected in zip(talks, mixed, straight, strict=True):
            assert same(generate(model, talk, past_key_values=cache), expected)
    assert not torch.equal(new_tokens(straight[0], talks[0]), new_tokens(straight[1], talks[1]))


@pytest.mark.parametrize(("kind", "build"), pairs(("picked", "probed")))
def test_two_requests_step_by_turns_under_one_plan(kind, build):
    """State is on the caches: on Qwen, where the model keeps position offsets on itself, too."""
    model = zoo.model(build)
    parts = [zoo.sample(build, "3 A 6"), zoo.sample(build, "5 B 4 C 3", seed=4)]
    with winnow.compress(model, CASES[kind].plan):
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


@pytest.mark.parametrize("how", ["reorder", "select", "repeat"])
@pytest.mark.parametrize(("kind", "build"), pairs(("picked", "probed")))
def test_rows_of_a_cache_can_be_moved_dropped_and_repeated(kind, build, how):
    """Masks, offsets and positions go with their rows, as the keys do."""
    model, inputs = zoo.model(build), zoo.inputs(build, zoo.RAGGED)
    rows = {"reorder": [2, 0, 1], "select": [2, 1], "repeat": [0, 0, 1, 1, 2, 2]}[how]
    mask = torch.cat([inputs["attention_mask"], torch.ones(3, 2, dtype=torch.int64)], 1)
    with winnow.compress(model, CASES[kind].plan):
        plain = forward(model, inputs, use_cache=True).past_key_values
        expected = forward(model, {"input_ids": TURN[:, :2], "attention_mask": mask}, past_key_values=plain).logits
        moved = forward(model, inputs, use_cache=True).past_key_values
        if how == "reorder":
            moved.reorder_cache(torch.tensor(rows))
        elif how == "select":
            moved.batch_select_indices(torch.tensor(rows))
        else:
            moved.batch_repeat_interleave(2)
        new = {"input_ids": TURN[rows, :2], "attention_mask": mask[rows]}
        found = forward(model, new, past_key_values=moved).logits
    assert (found - expected[rows]).abs().max() <= 1e-5


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
    with winnow.compress(model, Probed()) as handle:
        expected = generate(model, inputs)
        cache = DynamicCache(config=model.config.get_text_config())
        assert same(generate(model, inputs, past_key_values=cache), expected)
        assert cache.get_seq_length() == expected.sequences.shape[1] - 1
        assert [layer.keys.shape[2] for layer in cache.layers] == [
            max(counts) + STEPS - 1 for counts in handle.last.layer_tokens
        ]
