"""Traps of transformers that were found by experiment; each has its number in the engine notes.

Not here: 3 (the cost of ragged batches, a matter of speed). 6 (features as one tensor) and 7 (positions from 1) are
those of InternVL and PaliGemma, in `test_families`.
"""

from __future__ import annotations

import pytest
import torch
import zoo
from byhand import Reference
from cases import CASES, check_against_hand, pairs
from families import content, picks
from masked import Cut, MaskedReference
from probes import STEPS, Pick, Probed, Tapped, forward, generate, new_tokens, step_logits
from transformers import LogitsProcessor, LogitsProcessorList, masking_utils

import winnow
from winnow.core.plan import Plan

DEPTHS = ("picked", "probed")  # before the LM, and inside


@pytest.mark.parametrize(("kind", "build"), pairs(DEPTHS))
def test_trap_01_gapped_positions_without_mask_and_cache_are_no_packed_sequence(kind, build):
    """`generate(use_cache=False)` drops a mask of ones; gaps in the positions must not become block-diagonal masks."""
    model, part = zoo.model(build), zoo.sample(build, "3 A 6")
    plan, by_hand = CASES[kind]
    reference = Reference(model)
    worked = by_hand(reference, part, reference.entry(part))
    bare = {k: v for k, v in part.items() if k != "attention_mask"}
    with winnow.compress(model, plan):
        logits = forward(model, bare, use_cache=False).logits[0, -1]
        first = step_logits(generate(model, part, use_cache=False))[0, 0]
    expected = reference.run(worked.entry, (), worked.cuts).logits[0]
    assert (logits - expected).abs().max() <= 1e-5
    assert (first - expected).abs().max() <= 1e-5


@pytest.mark.parametrize("build", zoo.BUILDS)
def test_trap_01_the_lm_is_given_no_gapped_positions_without_mask_and_cache(build, monkeypatch):
    """For every way of calling: the LM gets no gapped positions that it would read as packed samples."""
    model, inputs = zoo.model(build), zoo.inputs(build, zoo.SINGLE)
    found: list[tuple[int, bool, bool]] = []

    def watch(module, args, kwargs):
        positions = kwargs.get("position_ids")
        gapped = positions is not None and bool((positions.diff(dim=-1) != 1).any())
        bare = kwargs.get("attention_mask") is None and kwargs.get("past_key_values", kwargs.get("cache")) is None
        # Without a cache given, the LM makes one unless it was told not to.
        found.append((kwargs["inputs_embeds"].shape[1], gapped, bare and kwargs.get("use_cache") is False))

    search = masking_utils.find_packed_sequence_indices
    packed: list[bool] = []

    def searched(position_ids):
        indices = search(position_ids)
        packed.append(indices is not None and bool((indices > 0).any()))
        return indices

    monkeypatch.setattr(masking_utils, "find_packed_sequence_indices", searched)
    with winnow.compress(model, Plan((Pick(keep=5), Probed()))):
        model.model.language_model.register_forward_pre_hook(watch, with_kwargs=True)
        for options in ({"use_cache": True}, {"use_cache": False}):
            generate(model, inputs, **options)
            forward(model, {k: v for k, v in inputs.items() if k != "attention_mask"}, **options)
    assert len(found) > 0
    assert not any(gapped and bare and length > 1 for length, gapped, bare in found)
    assert not any(packed)


@pytest.mark.parametrize("build", zoo.BUILDS)
def test_trap_02_layers_behind_a_cut_get_no_positions(build):
    """Flash attention reads positions only to find packed sequences; rotary embeddings are given apart."""
    model, inputs = zoo.model(build), zoo.inputs(build, zoo.RAGGED)
    given: dict[int, object] = {}
    with winnow.compress(model, Pick(keep=5, at="layers[2]")):
        for i, layer in enumerate(model.model.language_model.layers):
            layer.register_forward_pre_hook(
                lambda m, a, k, i=i: given.update({i: k.get("position_ids")}), with_kwargs=True
            )
        forward(model, inputs)
    assert given[2] is None
    assert given[3] is None


@pytest.mark.parametrize("build", zoo.BUILDS)
def test_trap_04_a_loss_can_be_computed_although_rows_are_gone(build):
    """Logits of the physical length would not fit the labels; test_outputs.py has the loss by hand."""
    model, inputs = zoo.model(build), zoo.inputs(build, zoo.RAGGED)
    labels = inputs["input_ids"].masked_fill(inputs["attention_mask"] == 0, -100)
    labels = labels.masked_fill(labels == zoo.IMAGE, -100)
    for plan in (Pick(keep=3), Probed()):
        with winnow.compress(model, plan):
            output = forward(model, inputs, labels=labels)
        assert output.logits.shape[:2] == labels.shape
        assert output.loss.isfinite()


@pytest.mark.parametrize("build", zoo.BUILDS)
def test_trap_05_hidden_states_stay_the_first_argument_of_a_layer(build):
    """The hooks of transformers that record them read `args[0]`; they are installed at the first use, in the plan."""
    model, inputs = zoo.model(build), zoo.inputs(build, zoo.RAGGED)
    shapes = []
    with winnow.compress(model, Plan((Pick(keep=3), Tapped(keep=2)))) as handle:
        model.model.language_model.layers[3].register_forward_pre_hook(lambda m, args: shapes.append(args[0].shape))
        output = forward(model, inputs, output_hidden_states=True)
        assert len(output.hidden_states) == zoo.DEPTH + 1
        assert shapes == [(3, max(handle.last.layer_tokens[3]), 64)]


@pytest.mark.parametrize("first", [0, 2])
def test_trap_08_sliding_windows_count_true_positions(first):
    """As the checkpoint was trained; counted in slots, a window would reach further back with each dropped token."""
    text = {"use_sliding_window": True, "sliding_window": 8, "max_window_layers": first}
    model, part = zoo.model("qwen2_5_vl", **text), zoo.sample("qwen2_5_vl", "3 A 6")
    assert "sliding_attention" in model.config.get_text_config().layer_types
    with winnow.compress(model, Pick(keep="40%")) as handle:
        output, items = generate(model, part), handle.last.items
    positions = content(model, part, items)
    cut = Cut(0, picks("40%", [len(own) for own in positions]))
    want = MaskedReference(model).run(part, positions, new_tokens(output, part)[0, :-1].tolist(), [cut])
    assert (step_logits(output)[0] - want.logits).abs().max() <= 1e-5
    with pytest.raises(winnow.UnsupportedError, match="positions=compact"):
        winnow.compress(model, Pick(keep="40%"), positions="compact")


@pytest.mark.parametrize("build", zoo.BUILDS)
def test_trap_09_with_beams_each_repeated_row_has_its_own_pictures(build):
    """Rows are repeated before the prompt is read, encoded pictures are not: items must follow their samples."""
    model, inputs = zoo.model(build), zoo.inputs(build, zoo.MIXED)
    with winnow.compress(model, Pick(keep=4)) as handle:
        generate(model, inputs)
        single = [(item.row, item.kept.tolist()) for item in handle.last.items]
        generate(model, inputs, num_beams=3)
        beams = [(item.row, item.kept.tolist()) for item in handle.last.items]
    per_row = {row: [kept for r, kept in single if r == row] for row in range(3)}
    for beam in range(9):
        assert [kept for r, kept in beams if r == beam] == per_row[beam // 3]


@pytest.mark.parametrize(("kind", "build"), pairs(DEPTHS))
def test_trap_10_the_returned_cache_goes_on_with_the_ordinary_ids(kind, build):
    """Its length is logical: `generate` finds by itself which ids are new."""
    model, inputs = zoo.model(build), zoo.inputs(build, zoo.RAGGED)
    with winnow.compress(model, CASES[kind].plan):
        long = generate(model, inputs, steps=2 * STEPS)
        short = generate(model, inputs)
        assert short.past_key_values.get_seq_length() == short.sequences.shape[1] - 1
        mask = torch.ones_like(short.sequences)
        mask[:, : inputs["attention_mask"].shape[1]] = inputs["attention_mask"]
        rest = {"input_ids": short.sequences, "attention_mask": mask}
        more = generate(model, rest, past_key_values=short.past_key_values)
    assert torch.equal(more.sequences, long.sequences)
    assert (step_logits(more) - step_logits(long)[:, STEPS:]).abs().max() <= 1e-5


@pytest.mark.parametrize("build", zoo.BUILDS)
def test_trap_11_ids_and_lengths_outside_are_those_of_the_prompt_as_given(build):
    """Streamers, processors, stopping criteria and `max_length` never see the shortened sequence."""
    model, inputs = zoo.model(build), zoo.inputs(build, zoo.RAGGED)
    width, seen = inputs["input_ids"].shape[1], []

    class Watch(LogitsProcessor):
        def __call__(self, input_ids, scores):
            seen.append(input_ids.shape[1])
            return scores

    with winnow.compress(model, Pick(keep=2)), torch.no_grad():
        options = {"logits_processor": LogitsProcessorList([Watch()]), "do_sample": False}
        sequences = model.generate(**inputs, max_length=width + 3, **options)
    assert seen == [width, width + 1, width + 2]
    assert torch.equal(sequences[:, :width], inputs["input_ids"])


@pytest.mark.parametrize(("kind", "build"), pairs(DEPTHS, ["qwen2_5_vl"]))
def test_trap_12_stepping_with_a_full_mask_after_a_picture_works_on_qwen(kind, build):
    """Plain transformers makes positions of the mask's length and fails; a compressed prompt brings its own."""
    model, inputs = zoo.model(build), zoo.inputs(build, zoo.RAGGED)
    with winnow.compress(model, CASES[kind].plan):
        expected = generate(model, inputs)
        output, mask = forward(model, inputs, use_cache=True), inputs["attention_mask"]
        for step in range(STEPS - 1):
            mask = torch.cat([mask, mask.new_ones(3, 1)], 1)
            token = {"input_ids": new_tokens(expected, inputs)[:, step : step + 1], "attention_mask": mask}
            output = forward(model, token, past_key_values=output.past_key_values)
            assert (output.logits[:, -1] - step_logits(expected)[:, step + 1]).abs().max() <= 1e-5


def test_trap_12_position_state_of_another_request_on_the_module_does_no_harm():
    """`rope_deltas` lies on the model; a request in between overwrites it."""
    model = zoo.model("qwen2_5_vl")
    parts = [zoo.sample("qwen2_5_vl", "3 A 6"), zoo.sample("qwen2_5_vl", "2 C 4 B 5", seed=3)]
    with winnow.compress(model, Probed()):
        expected = generate(model, parts[0])
        output = forward(model, parts[0], use_cache=True)
        for step in range(STEPS - 1):
            generate(model, parts[1], steps=2)
            token = {"input_ids": new_tokens(expected, parts[0])[:, step : step + 1]}
            output = forward(model, token, past_key_values=output.past_key_values)
            assert (output.logits[:, -1] - step_logits(expected)[:, step + 1]).abs().max() <= 1e-5


@pytest.mark.parametrize(("kind", "build"), pairs(DEPTHS))
def test_masks_of_ones_that_generate_drops_make_no_difference(kind, build):
    """Section 0 of the notes: batch 1 arrives without a mask, the same rows padded arrive with one."""
    plan, by_hand = CASES[kind]
    check_against_hand(zoo.model(build), zoo.samples(build, ("3 A 6", "3 A 6")), plan, by_hand)
    check_against_hand(zoo.model(build), zoo.samples(build, ("3 A 6", "3 A 8")), plan, by_hand)
