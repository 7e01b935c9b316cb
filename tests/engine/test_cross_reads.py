"""Rows of the language model that read beside the sequence: in prompts, turns, decoded tokens, beams and batches."""

from __future__ import annotations

import copy
from dataclasses import dataclass, replace
from functools import partial
from typing import ClassVar

import pytest
import torch
import zoo
from byhand import Entry, Hand, Read, Reference
from cases import check_against_hand, effect, picking, prolonged, same
from probes import STEPS, Pick, forward, generate, step_logits
from torch import Tensor

import winnow
from winnow.contract import CrossRead, Method, ModelInfo, Point, Reduction, Rows, State, Step, UnsupportedError, View
from winnow.core.errors import WinnowError
from winnow.core.plan import Plan

ROWS = ("3 A 6", "11", "2 B 4 C 5")
LAYERS = (1, 2)


@dataclass(frozen=True)
class Beside(Method):
    """Text, or what is left of pictures, adds the mean of all tokens of its pictures, turned by what it carries."""

    gate: float = 0.5
    place: str = "heads"
    kind: str = "text"
    slug: ClassVar[str] = "beside-of-the-tests"
    identity: ClassVar[None] = None

    def steps(self, info: ModelInfo) -> tuple[Step, ...]:
        return (Step(Point("projected"), self.put),)

    def cross_reads(self, info: ModelInfo) -> tuple[CrossRead, ...]:
        return tuple(CrossRead(layer, self.kind, self.place, partial(self.read, layer)) for layer in LAYERS)  # type: ignore[arg-type]

    def put(self, view: View, state: State) -> tuple[Reduction, State]:
        everything = torch.arange(view.n).expand(view.b, -1)
        return Reduction.select(everything, view.n), replace(state, item={"tokens": view.tokens})

    def read(self, layer: int, rows: Rows) -> Tensor:
        tokens = torch.cat([own["tokens"] for own in rows.memory])
        if self.kind == "visual":
            assert len(rows.memory) == 1
            tokens = tokens[rows.ids]  # each row reads the token that it was
        return said(self.gate, layer, rows.carried, rows.queries, tokens)


def said(gate: float, layer: int, carried: Tensor, queries: Tensor | None, tokens: Tensor) -> Tensor:
    """What is added, which the rows, their queries, the layer and the tokens decide."""
    told = tokens if len(tokens) == len(carried) else tokens.mean(0, keepdim=True)
    turned = carried.tanh() if queries is None else queries.transpose(0, 1).flatten(1).sin()
    return gate * (layer + turned) * told.repeat(1, carried.shape[1] // told.shape[1])


def beside(
    reference: Reference,
    sample: dict[str, Tensor],
    entry: Entry,
    gate: float = 0.5,
    place: str = "heads",
    kind: str = "text",
    keep: int | None = None,
) -> Hand:
    """By hand, what the probe does; `keep`: tokens of each picture that are picked behind it, before layer 2."""
    content = torch.cat([*entry.content, torch.zeros(0, dtype=torch.int64)])
    visual = torch.cat([*entry.items, torch.zeros(0, dtype=torch.int64)])

    def add(layer: int, carried: Tensor, queries: Tensor | None, held: Tensor | None) -> Tensor:
        added = torch.zeros_like(carried)
        for row in range(len(carried)):
            at = None if held is None else int(held[row])
            if kind == "text" and (at is None or at not in visual):
                tokens = entry.embeds[0, content].mean(0, keepdim=True)
            elif kind == "visual" and at is not None and at in content:
                tokens = entry.embeds[0, at][None]
            else:
                continue
            own = None if queries is None else queries[:, row : row + 1]
            added[row] = said(gate, layer, carried[row : row + 1], own, tokens)[0]
        return added

    reads = {}
    for layer in LAYERS if len(content) else ():
        if place == "heads":
            reads[layer] = Read(heads=lambda o, q, held, k=layer: add(k, o, q, held))
        else:
            reads[layer] = Read(states=lambda h, held, k=layer: add(k, h, None, held))
    cuts = {} if keep is None else {2: picking(entry, keep)}
    return Hand(entry, cuts, reads)


@pytest.mark.parametrize("build", zoo.BUILDS)
@pytest.mark.parametrize("place", ["heads", "residual"])
@pytest.mark.parametrize("kind", ["text", "visual"])
def test_equals_by_hand(build: str, place: str, kind: str) -> None:
    """In a padded batch with none, one and two pictures: the prompt's logits, and those of every decoded token."""
    plan = Plan((Beside(place=place, kind=kind),))
    by_hand = partial(beside, place=place, kind=kind)
    check_against_hand(zoo.model(build), zoo.samples(build, ROWS), plan, by_hand)
    assert effect(zoo.model(build), zoo.inputs(build, ROWS), plan) > 1e-3


@pytest.mark.parametrize("kind", ["text", "visual"])
@pytest.mark.parametrize("build", ["llava_next", "qwen2_5_vl"])
def test_tokens_that_leave_in_a_layer_between(build: str, kind: str) -> None:
    plan = Plan((Beside(place="residual", kind=kind), Pick(keep=5, at="layers[2]")))
    by_hand = partial(beside, place="residual", kind=kind, keep=5)
    check_against_hand(zoo.model(build), zoo.samples(build, ROWS), plan, by_hand)


@pytest.mark.parametrize("place", ["heads", "residual"])
@pytest.mark.parametrize("kind", ["text", "visual"])
@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
def test_a_gate_of_zero_changes_no_bit(place: str, kind: str, implementation: str) -> None:
    """The plan without the reading and the one that reads with a gate of 0; and the same gate open is seen."""
    model, inputs = zoo.model("qwen2_5_vl"), zoo.inputs("qwen2_5_vl", ROWS)
    model.set_attn_implementation(implementation)
    pick = Pick(keep=7, at="layers[2]")
    with winnow.compress(model, Plan((pick,))):
        want = generate(model, inputs)
    with winnow.compress(model, Plan((Beside(0.0, place, kind), pick))):
        assert same(generate(model, inputs), want)
    with winnow.compress(model, Plan((Beside(0.5, place, kind), pick))):
        assert not same(generate(model, inputs), want)


@pytest.mark.parametrize("place", ["heads", "residual"])
def test_a_later_turn_reads_what_the_first_one_put_there_under_any_plan(place: str) -> None:
    """As a forward of the whole conversation does; on a copy of the cache as well."""
    model, inputs = zoo.model("llava_clip"), zoo.inputs("llava_clip", ROWS)
    plan = Plan((Beside(place=place),))
    with winnow.compress(model, plan) as handle:
        output = generate(model, inputs)
        later = prolonged(inputs, output.sequences[:, :-1])
        spare = copy.deepcopy(output.past_key_values)
        found = generate(model, later, past_key_values=output.past_key_values)
        with handle.using("full"):
            assert same(generate(model, later, past_key_values=spare), found)
        whole = generate(model, {**inputs, **later})
    assert torch.equal(found.sequences, whole.sequences)
    assert (step_logits(found) - step_logits(whole)).abs().max() <= 1e-4


def test_a_picture_of_a_later_turn_is_read_beside_the_first() -> None:
    model = zoo.model("llava_clip")
    first, second = zoo.sample("llava_clip", "3 A 6"), zoo.sample("llava_clip", "2 B 5")
    second.pop("attention_mask")
    seen: list[int] = []

    class Counting(Beside):
        def read(self, layer: int, rows: Rows) -> Tensor:
            seen.append(len(rows.memory))
            return super().read(layer, rows)

    with winnow.compress(model, Plan((Counting(),))) as handle:
        cache = forward(model, first, use_cache=True).past_key_values
        assert seen == [1, 1]
        forward(model, second, past_key_values=cache)
        assert seen == [1, 1, 2, 2]
        tokens = sum(zoo.tokens_of("llava_clip", letter) for letter in "AB")
        assert handle.last.notes["beside_bytes"] == tokens * 64 * 4


def test_rows_of_a_cache_take_their_memory_along() -> None:
    """Beams, repeated and selected rows: each goes on as it does alone."""
    model, inputs = zoo.model("llava_clip"), zoo.inputs("llava_clip", ROWS)
    token = torch.tensor([[20], [21], [22]])
    with winnow.compress(model, Plan((Beside(),))):
        cache = forward(model, inputs, use_cache=True).past_key_values
        mask = torch.cat([inputs["attention_mask"], torch.ones(3, 1, dtype=torch.int64)], 1)
        want = forward(model, {"input_ids": token, "attention_mask": mask}, past_key_values=copy.deepcopy(cache)).logits
        assert (want[0] - want[2]).abs().max() > 1e-3
        order = torch.tensor([2, 0, 1])
        for move, index in (
            ("reorder_cache", order),
            ("batch_select_indices", torch.tensor([2, 0])),
            ("batch_repeat_interleave", 2),
        ):
            own = copy.deepcopy(cache)
            getattr(own, move)(index)
            rows = torch.arange(3).repeat_interleave(2) if move == "batch_repeat_interleave" else index
            step = {"input_ids": token[rows], "attention_mask": mask[rows]}
            assert (forward(model, step, past_key_values=own).logits - want[rows]).abs().max() <= 1e-5
        with pytest.raises(WinnowError, match="what 3 samples read beside the sequence"):
            forward(model, {"input_ids": token[:2]}, past_key_values=copy.deepcopy(cache))


def test_beams_read_as_alone() -> None:
    """The score of the best of several beams is that of its tokens, forced one by one."""
    model, sample = zoo.model("llava_clip"), zoo.sample("llava_clip", "3 A 6")
    with winnow.compress(model, Plan((Beside(),))):
        found = model.generate(
            **sample, max_new_tokens=STEPS, num_beams=3, output_scores=True, return_dict_in_generate=True
        )
        said = found.sequences[:, sample["input_ids"].shape[1] :]
        ids = torch.cat([sample["input_ids"], said], 1)
        logits = forward(model, {**sample, "input_ids": ids, "attention_mask": torch.ones_like(ids)}).logits
        logs = logits[:, -STEPS - 1 : -1].log_softmax(-1).gather(2, said[..., None]).sum()
    assert abs(float(logs) / STEPS - float(found.sequences_scores)) <= 1e-4


def test_several_answers_read_the_same() -> None:
    model, sample = zoo.model("llava_clip"), zoo.sample("llava_clip", "3 A 6")
    with winnow.compress(model, Plan((Beside(),))):
        torch.manual_seed(0)
        output = generate(model, sample, do_sample=True, num_return_sequences=3)
        for row in range(3):
            said = output.sequences[row : row + 1, sample["input_ids"].shape[1] :]
            ids = torch.cat([sample["input_ids"], said], 1)
            whole = {**sample, "input_ids": ids, "attention_mask": torch.ones_like(ids)}
            logits = forward(model, whole).logits[0, -STEPS - 1 : -1]
            assert (logits - step_logits(output)[row]).abs().max() <= 1e-4


def test_without_a_cache_every_forward_reads() -> None:
    model, sample = zoo.model("llava_clip"), zoo.sample("llava_clip", "3 A 6")
    with winnow.compress(model, Plan((Beside(),))):
        want = generate(model, sample)
        assert (step_logits(generate(model, sample, use_cache=False)) - step_logits(want)).abs().max() <= 1e-5


def test_the_prompt_cannot_be_cropped_and_what_follows_can() -> None:
    model, sample = zoo.model("llava_clip"), zoo.sample("llava_clip", "3 A 6")
    with winnow.compress(model, Plan((Beside(),))):
        cache = forward(model, sample, use_cache=True).past_key_values
        step = {"input_ids": torch.tensor([[20]])}
        want = forward(model, step, past_key_values=cache).logits
        cache.crop(-1)
        assert torch.equal(forward(model, step, past_key_values=cache).logits, want)
        with pytest.raises(WinnowError, match="a compressed prompt, which cannot be cut"):
            cache.crop(-40)
        cache.reset()
        text = zoo.sample("llava_clip", "9")
        plain = forward(zoo.model("llava_clip"), text).logits
        assert torch.equal(forward(model, text, past_key_values=cache).logits, plain)


def test_a_cache_that_was_filled_under_another_attachment() -> None:
    model, sample = zoo.model("llava_clip"), zoo.sample("llava_clip", "3 A 6")
    step = {"input_ids": torch.tensor([[20]])}
    plan = Plan((Beside(),))
    with winnow.compress(model, plan):
        cache = forward(model, sample, use_cache=True).past_key_values
        want = forward(model, step, past_key_values=copy.deepcopy(cache)).logits
    with pytest.raises(WinnowError, match="no longer compressed"):
        forward(model, step, past_key_values=copy.deepcopy(cache))
    with winnow.compress(model, plan):
        assert torch.equal(forward(model, step, past_key_values=copy.deepcopy(cache)).logits, want)
    with winnow.compress(model, Pick(keep=4)), pytest.raises(WinnowError, match="go on with the plan and the rows"):
        forward(model, step, past_key_values=cache)


def test_gradients_reach_what_reads_and_what_is_read() -> None:
    model, sample = zoo.model("llava_clip"), zoo.sample("llava_clip", "3 A 6")
    model.requires_grad_(False)
    weight = torch.tensor(0.5, requires_grad=True)

    class Learned(Beside):
        def read(self, layer: int, rows: Rows) -> Tensor:
            return weight * super().read(layer, rows)

    with winnow.compress(model, Plan((Learned(),))):
        loss = model(**sample).logits[0, -1].max()
        (grad,) = torch.autograd.grad(loss, weight)
        with torch.no_grad():
            eps = 1e-2
            weight += eps
            more = model(**sample).logits[0, -1].max()
            weight -= 2 * eps
            less = model(**sample).logits[0, -1].max()
    assert float(grad) == pytest.approx(float(more - less) / (2 * eps), rel=2e-2)


def test_what_cannot_be_done_is_refused() -> None:
    plan = Plan((Beside(),))
    model, sample = zoo.model("llava_clip"), zoo.sample("llava_clip", "3 A 6")
    with pytest.raises(UnsupportedError, match=r"use winnow\.compress"):
        winnow.prepare(model, sample, plan)
    with pytest.raises(UnsupportedError, match="would grow with each frame"):
        winnow.stream(zoo.model("qwen2_5_vl"), plan, bounded=False)
    with pytest.raises(UnsupportedError, match="static cache"), winnow.compress(model, plan):
        generate(model, sample, cache_implementation="static")
    model.train()
    model.gradient_checkpointing_enable()
    with winnow.compress(model, plan), pytest.raises(UnsupportedError, match="gradient_checkpointing_disable"):
        model(**sample)


def test_a_layer_that_scales_what_its_attention_gives_is_refused() -> None:
    model, sample = zoo.model("llava_clip"), zoo.sample("llava_clip", "3 A 6")
    layer = model.model.language_model.layers[1]
    layer.post_attention_layernorm.register_forward_pre_hook(lambda module, args: (args[0] * 0.5,))
    refused = pytest.raises(UnsupportedError, match="layer 1 does not add what its attention gives")
    with winnow.compress(model, Plan((Beside(place="residual"),))), refused:
        forward(model, sample)
