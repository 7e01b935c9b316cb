"""A second question about the same picture: the first selection is kept and the ledger says so, or it is made again.

By hand, selecting again is the whole conversation in one request with its pixels and without a cache.
"""

from __future__ import annotations

import copy

import pytest
import torch
import zoo
from cases import TURN, prolonged
from probes import Pick, forward, generate, new_tokens, step_logits
from subjects import HYBRID, WHOLE, named
from torch import Tensor

import winnow
from winnow.engine.turns import AGAIN, FIRST
from winnow.models.supported_versions import trying

PLAN = "fastv:layer=2,keep=4"
TYPES = ("token_type_ids", "mm_token_type_ids")


def compress(model, plan=PLAN, **options):
    with trying():
        return winnow.compress(model, plan, **options)


def whole(inputs: dict[str, Tensor], talk: dict[str, Tensor]) -> dict[str, Tensor]:
    """A conversation with the pictures of its first turn."""
    made = {**inputs, **talk}
    for name in TYPES:
        if name in made:
            late = talk["input_ids"].shape[1] - inputs[name].shape[1]
            made[name] = torch.nn.functional.pad(inputs[name], (0, late))
    return made


def kept(handle) -> list[list[int]]:
    return [item.kept.tolist() for item in handle.last.items]


def close(a, b) -> bool:
    return torch.equal(a.sequences, b.sequences) and float((step_logits(a) - step_logits(b)).abs().max()) <= 1e-5


@pytest.mark.parametrize("place", ["device", "cpu"])
@pytest.mark.parametrize("build", zoo.BUILDS)
def test_selecting_again_over_a_padded_batch_equals_the_whole_conversation_at_once(build, place):
    model, inputs = zoo.model(build), zoo.inputs(build, zoo.MIXED)
    with compress(model, turns="again", keep_features=place) as handle:
        first = generate(model, inputs, steps=3)
        was = kept(handle)
        assert handle.last.selection is None
        talk = prolonged(inputs, first.sequences)
        second = generate(model, talk, past_key_values=first.past_key_values)
        now = kept(handle)
        assert handle.last.selection == AGAIN
        assert handle.last.notes["read_again"] == inputs["input_ids"].shape[1] + 2
        assert handle.last.logical == tuple(talk["attention_mask"].sum(1).tolist())
        at_once = generate(model, whole(inputs, talk))
        assert kept(handle) == now
        third = generate(model, prolonged(talk, second.sequences), past_key_values=second.past_key_values)
        at_last = generate(model, whole(inputs, prolonged(talk, second.sequences)))
    assert was != now
    assert close(second, at_once)
    assert close(third, at_last)


@pytest.mark.parametrize(
    "subject",
    [
        pytest.param(s, id=s.name, marks=() if s.name in ("gemma3", "qwen3_5") else (pytest.mark.full,))
        for s in named(WHOLE, HYBRID)
    ],
)
def test_selecting_again_on_other_classes_equals_the_whole_conversation_at_once(subject):
    model, inputs = subject.model(), subject.sample("3 A 6")
    with compress(model, turns="again") as handle:
        first = generate(model, inputs, steps=3)
        talk = prolonged(inputs, first.sequences, TURN[:1])
        second = generate(model, talk, past_key_values=first.past_key_values)
        now = kept(handle)
        at_once = generate(model, whole(inputs, talk))
        assert kept(handle) == now
    assert close(second, at_once)


@pytest.mark.parametrize("build", zoo.BUILDS)
def test_the_question_of_a_later_turn_is_the_text_of_that_turn(build):
    """For what reads the question's span, not only the last token: the old question is no part of the new one."""
    model, inputs = zoo.model(build), zoo.sample(build, "3 A 6")
    plan = "todre:keep=6"
    with compress(model, plan, turns="again") as handle:
        first = generate(model, inputs, steps=3)
        past = first.past_key_values.get_seq_length()
        talk = prolonged(inputs, first.sequences, TURN[:1])
        second = generate(model, talk, past_key_values=first.past_key_values)
        now = handle.last.layer_tokens
        with handle.using(plan, spans=[(past, talk["input_ids"].shape[1])]):
            at_once = generate(model, whole(inputs, talk))
            assert handle.last.layer_tokens == now
    assert close(second, at_once)


@pytest.mark.parametrize("place", ["device", "cpu"])
def test_what_steps_before_the_projector_made_is_kept_too(place):
    model, inputs = zoo.model("llava_clip"), zoo.inputs("llava_clip", zoo.MIXED)
    with compress(model, f"visionzip:keep=9 + {PLAN}", turns="again", keep_features=place) as handle:
        first = generate(model, inputs, steps=3)
        talk = prolonged(inputs, first.sequences)
        second = generate(model, talk, past_key_values=first.past_key_values)
        now = kept(handle)
        at_once = generate(model, whole(inputs, talk))
        assert kept(handle) == now
    assert close(second, at_once)


def test_the_pixels_may_come_along_and_others_may_not():
    model, inputs = zoo.model("qwen2_5_vl"), zoo.sample("qwen2_5_vl", "3 A 6")
    other = zoo.sample("qwen2_5_vl", "3 B 6")
    with compress(model, turns="again"):
        first = generate(model, inputs, steps=3)
        talk = prolonged(inputs, first.sequences, TURN[:1])
        cache = copy.deepcopy(first.past_key_values)
        want = generate(model, talk, past_key_values=copy.deepcopy(cache))
        assert close(generate(model, whole(inputs, talk), past_key_values=copy.deepcopy(cache)), want)
        pixels = {name: other[name] for name in ("pixel_values", "image_grid_thw")}
        with pytest.raises(winnow.UnsupportedError, match="not those of its pictures"):
            generate(model, {**whole(inputs, talk), **pixels}, past_key_values=cache)


@pytest.mark.parametrize("build", zoo.BUILDS)
def test_copies_and_cropped_caches_ask_again_too(build):
    """One picture, several questions: each on a copy, or behind what the last one was cropped to."""
    model, inputs = zoo.model(build), zoo.inputs(build, zoo.RAGGED)
    with compress(model, turns="again"):
        first = generate(model, inputs, steps=3)
        talks = [prolonged(inputs, first.sequences, turn) for turn in (TURN, TURN.flip(1))]
        want = [generate(model, whole(inputs, talk)) for talk in talks]
        for talk, expected in zip(talks, want, strict=True):
            found = generate(model, talk, past_key_values=copy.deepcopy(first.past_key_values))
            assert close(found, expected)
        cache = generate(model, talks[0], past_key_values=first.past_key_values).past_key_values
        past = first.sequences.shape[1] - 1
        cache.crop(past - cache.get_seq_length())
        assert close(generate(model, talks[1], past_key_values=cache), want[1])


@pytest.mark.parametrize("build", zoo.BUILDS)
def test_the_default_keeps_the_first_selection_and_the_ledger_says_so(build):
    model, inputs = zoo.model(build), zoo.inputs(build, zoo.MIXED)
    with compress(model) as handle:
        first = generate(model, inputs, steps=3)
        was = kept(handle)
        assert handle.last.selection is None
        talk = prolonged(inputs, first.sequences)
        generate(model, talk, past_key_values=first.past_key_values)
        assert handle.last.selection == FIRST
        assert kept(handle) == was
        generate(model, inputs)
        assert handle.last.selection is None


@pytest.mark.parametrize("turns", ["first", "again"])
def test_what_reads_no_text_has_nothing_to_select_again(turns):
    """The selection is the same for every question: the turn is read alone, and the ledger stays as it is."""
    model, inputs = zoo.model("llava_clip"), zoo.inputs("llava_clip", zoo.MIXED)
    with compress(model, Pick(keep=5), turns=turns) as handle:
        first = generate(model, inputs, steps=3)
        ledger, talk = handle.last, prolonged(inputs, first.sequences)
        second = generate(model, talk, past_key_values=first.past_key_values)
        assert handle.last is ledger
        assert handle.last.selection is None
        assert close(second, generate(model, whole(inputs, talk)))


def test_a_cache_of_any_step_by_hand_asks_again():
    """`model(ids, past_key_values=…)` with several tokens is a turn; with one it is a decoded token."""
    model, inputs = zoo.model("llava_clip"), zoo.sample("llava_clip", "3 A 6")
    with compress(model, turns="again") as handle:
        cache = forward(model, inputs, use_cache=True).past_key_values
        ledger = handle.last
        forward(model, {"input_ids": TURN[:1, :1]}, past_key_values=cache)
        assert handle.last is ledger
        found = forward(model, {"input_ids": TURN[:1, 1:]}, past_key_values=cache, output_hidden_states=True)
        ids = torch.cat([inputs["input_ids"], TURN[:1]], 1)
        want = forward(model, {"input_ids": ids, "pixel_values": inputs["pixel_values"]})
    count = TURN.shape[1] - 1
    assert (found.logits - want.logits[:, -count:]).abs().max() <= 1e-5
    assert {state.shape[1] for state in found.hidden_states} == {count}


# What cannot be selected again is refused, with what to do


def _reordered(model, inputs):
    first = generate(model, inputs, steps=3)
    first.past_key_values.reorder_cache(torch.tensor([0]))
    return first, {}


def _assisted(model, inputs):
    return generate(model, inputs, steps=3), {"prompt_lookup_num_tokens": 3}


@pytest.mark.parametrize(
    ("start", "reason"), [(_reordered, "moved or repeated"), (_assisted, "drafted")], ids=["reordered", "assisted"]
)
def test_what_cannot_be_selected_again_is_refused(start, reason):
    model, inputs = zoo.model("llava_clip"), zoo.sample("llava_clip", "3 A 6")
    with compress(model, turns="again"):
        first, options = start(model, inputs)
        talk = prolonged(inputs, first.sequences, TURN[:1])
        with pytest.raises(winnow.UnsupportedError, match=rf"{reason}.*turns='first'"):
            generate(model, talk, past_key_values=first.past_key_values, **options)


def test_another_plan_is_refused_and_the_conversation_goes_on_under_its_own():
    model, inputs = zoo.model("llava_clip"), zoo.sample("llava_clip", "3 A 6")
    with compress(model, turns="again") as handle:
        first = generate(model, inputs, steps=3)
        talk, cache = prolonged(inputs, first.sequences, TURN[:1]), first.past_key_values
        with handle.using("fastv:layer=2,keep=3"), pytest.raises(winnow.UnsupportedError, match="another plan"):
            generate(model, talk, past_key_values=cache)
        found = generate(model, talk, past_key_values=cache)
        assert close(found, generate(model, whole(inputs, talk)))


def test_a_new_picture_in_a_later_turn_is_refused():
    model, inputs, new = zoo.model("llava_clip"), *(zoo.sample("llava_clip", row) for row in ("3 A 6", "2 B 4"))
    with compress(model, turns="again"):
        first = generate(model, inputs, steps=3)
        talk = prolonged(inputs, first.sequences, new["input_ids"])
        with pytest.raises(winnow.UnsupportedError, match="another picture"):
            generate(model, {**talk, "pixel_values": new["pixel_values"]}, past_key_values=first.past_key_values)


def test_a_cache_that_was_filled_for_the_first_question_only_is_refused():
    model, inputs = zoo.model("llava_clip"), zoo.sample("llava_clip", "3 A 6")
    with compress(model):
        first = generate(model, inputs, steps=3)
    talk = prolonged(inputs, first.sequences, TURN[:1])
    with compress(model, turns="again"), pytest.raises(winnow.UnsupportedError, match="nothing was kept"):
        generate(model, talk, past_key_values=first.past_key_values)


def test_a_conversation_that_could_not_be_read_again_is_not_taken_for_a_new_one():
    model, inputs = zoo.model("llava_clip"), zoo.sample("llava_clip", "3 A 6")
    layer = model.model.language_model.layers[3]

    def fail(*_):
        raise RuntimeError("out of memory")

    with compress(model, turns="again"):
        first = generate(model, inputs, steps=3)
        talk, cache = prolonged(inputs, first.sequences, TURN[:1]), first.past_key_values
        hook = layer.register_forward_pre_hook(fail)
        with pytest.raises(RuntimeError, match="memory"):
            generate(model, talk, past_key_values=cache)
        hook.remove()
        with pytest.raises(winnow.UnsupportedError, match="failed"):
            generate(model, talk, past_key_values=cache)
        assert close(generate(model, inputs, steps=3), first)


@pytest.mark.parametrize("options", [{"turns": "last"}, {"keep_features": "disk"}])
def test_other_values_are_refused_with_those_that_are_allowed(options):
    with pytest.raises(winnow.WinnowError, match=r"use one of 'first'|use one of 'device'"):
        compress(zoo.model("llava_clip"), **options)


@pytest.mark.parametrize("build", zoo.BUILDS)
def test_where_nothing_follows_the_picture_its_last_token_is_the_question(build):
    """The rule where there is no question (captioning by a bare picture), for each way of reading it."""
    model, inputs = zoo.model(build), zoo.sample(build, "5 A")
    n = inputs["input_ids"].shape[1]
    if build == "qwen2_5_vl" or inputs["input_ids"][0, -1] != zoo.IMAGE:
        inputs = {k: v[:, :-1] if v.shape[1:2] == (n,) else v for k, v in inputs.items()}
        n -= 1
    assert inputs["input_ids"][0, -1] == zoo.IMAGE
    for plan in ("todre:keep=6", PLAN):
        with compress(model, plan) as handle:
            found = generate(model, inputs)
            was = handle.last.layer_tokens
            with handle.using(plan, spans=[(n - 1, n)]):
                assert close(generate(model, inputs), found)
                assert handle.last.layer_tokens == was
    assert new_tokens(found, inputs).shape == (1, 6)
