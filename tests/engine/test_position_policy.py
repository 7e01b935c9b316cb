"""`keep`: each survivor keeps its true position. `compact`: survivors and what follows are numbered without gaps."""

from __future__ import annotations

from dataclasses import replace
from functools import partial

import pytest
import torch
import zoo
from byhand import Hand, Reference
from cases import CASES, ByHand, check_against_hand, identities, pairs, picking, same
from probes import Halve, Pick, Probed, Tapped, forward, generate, new_tokens, step_logits

import winnow
from winnow.core.plan import Plan

ONE_DIMENSIONAL = ("llava_clip", "llava_siglip", "llava_next")


def compact(plan) -> Plan:
    return replace(Plan.of(plan), positions="compact")


def compact_by_hand(kind: str) -> ByHand:
    """The same choice, except where the attention that decides is itself computed at compact positions."""
    by_hand = CASES[kind].by_hand
    return partial(by_hand, compact=True) if kind in ("tapped", "probed") else by_hand


@pytest.mark.parametrize("rows", [zoo.RAGGED, zoo.MIXED], ids=["ragged", "mixed"])
@pytest.mark.parametrize(("kind", "build"), pairs(("picked", "folded", "merged", "probed"), ONE_DIMENSIONAL))
def test_compact_equals_by_hand(kind, build, rows):
    """Every layer numbers what it reads 0 … n − 1 and decodes on from n: three offsets where it is cut three times."""
    plan = compact(CASES[kind].plan)
    check_against_hand(zoo.model(build), zoo.samples(build, rows), plan, compact_by_hand(kind), compact=True)


@pytest.mark.parametrize("build", ONE_DIMENSIONAL)
def test_compact_differs_from_keep(build):
    """Else the comparison above would not show that anything was renumbered."""
    model, inputs = zoo.model(build), zoo.inputs(build, zoo.RAGGED)
    with winnow.compress(model, Pick(keep=6)):
        kept = forward(model, inputs).logits[:, -1]
    with winnow.compress(model, compact(Pick(keep=6))) as handle:
        assert (forward(model, inputs).logits[:, -1] - kept).abs().max() > 1e-3
        assert handle.last.positions == "compact"


@pytest.mark.parametrize("build", ONE_DIMENSIONAL)
def test_the_argument_of_compress_overrides_the_plan(build):
    model, inputs = zoo.model(build), zoo.inputs(build, zoo.RAGGED)
    with winnow.compress(model, compact(Pick(keep=6))):
        said = generate(model, inputs)
    with winnow.compress(model, Pick(keep=6), positions="compact"):
        assert same(generate(model, inputs), said)
    with winnow.compress(model, Plan((Pick(keep=6),), positions="compact")):
        assert same(generate(model, inputs), said)


@pytest.mark.parametrize("build", ONE_DIMENSIONAL)
def test_compact_with_everything_kept_is_bit_identical(build):
    model, inputs = zoo.model(build), zoo.inputs(build, zoo.MIXED)
    plain = generate(model, inputs)
    for plan in identities(build):
        with winnow.compress(model, compact(plan)):
            assert same(generate(model, inputs), plain), plan


def test_compact_is_refused_where_positions_have_three_dimensions():
    with pytest.raises(winnow.UnsupportedError, match=r"compact.*1-D positions.*positions=keep"):
        winnow.compress(zoo.model("qwen2_5_vl"), Plan((Tapped(),), positions="compact"))


@pytest.mark.parametrize("positions", ["keep", "compact"])
@pytest.mark.parametrize("build", ONE_DIMENSIONAL)
def test_positions_of_later_turns_equal_by_hand(build, positions):
    """Text of a second turn, several tokens at once, on layers of three lengths: it goes on where each layer ended."""
    parts = zoo.samples(build, zoo.RAGGED)
    inputs = zoo.collate(parts)
    plan = Plan.of(Probed(), positions=positions)
    tight = positions == "compact"
    by_hand = partial(CASES["probed"].by_hand, compact=tight)
    model = zoo.model(build)
    reference = Reference(model)
    turn = torch.randint(10, 200, (3, 5), generator=torch.Generator().manual_seed(3))
    with winnow.compress(model, plan):
        first = generate(model, inputs)
        ids = torch.cat([first.sequences, turn], 1)
        mask = torch.cat([inputs["attention_mask"], torch.ones(3, ids.shape[1] - inputs["input_ids"].shape[1])], 1)
        second_inputs = {"input_ids": ids, "attention_mask": mask.long()}
        second = generate(model, second_inputs, past_key_values=first.past_key_values)
    said, answer = new_tokens(first, inputs), new_tokens(second, second_inputs)
    for row, part in enumerate(parts):
        worked = by_hand(reference, part, reference.entry(part))
        forced = [*said[row].tolist(), *turn[row].tolist(), *answer[row, :-1].tolist()]
        trace = reference.run(worked.entry, forced, worked.cuts, tight)
        expected = trace.logits[-answer.shape[1] :]
        assert (step_logits(second)[row] - expected).abs().max() <= 1e-5


@pytest.mark.parametrize("build", zoo.BUILDS)
def test_a_merged_token_has_the_position_of_its_anchor(build):
    """By hand: the pair stands where its first token stood; on Qwen in all three dimensions."""
    parts = zoo.samples(build, zoo.RAGGED)
    model = zoo.model(build)
    with winnow.compress(model, Halve()) as handle:
        forward(model, zoo.collate(parts))
        for item in handle.last.items:
            assert item.kept.tolist() == list(range(0, item.n_visual, 2))


@pytest.mark.parametrize("build", ONE_DIMENSIONAL)
def test_compact_at_depth_leaves_earlier_layers_alone(build):
    """Layers before the cut hold all positions and decode at the full length; only later ones are offset."""
    parts = zoo.samples(build, zoo.SINGLE)

    by_hand = lambda r, s, e: Hand(e, {3: picking(e, 4)})  # noqa: E731
    plan = compact(Pick(keep=4, at="layers[3]"))
    check_against_hand(zoo.model(build), parts, plan, by_hand, compact=True)


@pytest.mark.parametrize("positions", ["keep", "compact"])
@pytest.mark.parametrize("build", ONE_DIMENSIONAL)
def test_positions_of_the_caller_are_respected(build, positions):
    """Counted over the mask, as `generate` does: its logits; from a far start: the same, as RoPE is relative."""
    model, inputs = zoo.model(build), zoo.inputs(build, zoo.RAGGED)
    counted = (inputs["attention_mask"].cumsum(1) - 1).clamp_min(0)
    with winnow.compress(model, Probed(), positions=positions):
        expected = step_logits(generate(model, inputs))[:, 0]
        for given in (counted, counted + 100):
            found = forward(model, {**inputs, "position_ids": given}).logits[:, -1]
            assert (found - expected).abs().max() <= 1e-4
        exactly = forward(model, {**inputs, "position_ids": counted}, logits_to_keep=1).logits[:, 0]
        assert torch.equal(exactly, expected)
