"""Where a step acts: `projected` is `layers[0]`, stages compose, merged rows go where they belong."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import pytest
import torch
import zoo
from byhand import Entry, Hand, Reference, cut
from cases import TOWERS, check_against_hand, merging, picking, same
from probes import Halve, Pick, forward, generate, step_logits

import winnow
from winnow.core.info import ModelInfo
from winnow.core.method import Method
from winnow.core.plan import Plan
from winnow.core.point import Point
from winnow.core.reduction import Reduction
from winnow.core.step import Reduce, Step
from winnow.core.view import View

ROWS = {"ragged": zoo.RAGGED, "single": zoo.SINGLE, "mixed": zoo.MIXED}


@pytest.mark.parametrize("method", [Pick, Halve])
@pytest.mark.parametrize("rows", ROWS.values(), ids=ROWS)
@pytest.mark.parametrize("build", zoo.BUILDS)
def test_before_layer_0_is_projected_bit_for_bit(build, rows, method):
    model, inputs = zoo.model(build), zoo.inputs(build, rows)
    with winnow.compress(model, method(at="projected")) as handle:
        logits, said, projected = forward(model, inputs).logits, generate(model, inputs), handle.last
    with winnow.compress(model, method(at="layers[0]")) as handle:
        assert torch.equal(forward(model, inputs).logits, logits)
        assert same(generate(model, inputs), said)
        assert handle.last.layer_tokens == projected.layer_tokens
        for a, b in zip(handle.last.items, projected.items, strict=True):
            assert torch.equal(a.kept, b.kept)


@pytest.mark.parametrize("layer", range(zoo.DEPTH))
@pytest.mark.parametrize("build", zoo.BUILDS)
def test_a_selection_before_any_layer_equals_by_hand(build, layer):
    parts = zoo.samples(build, zoo.MIXED)
    method = Pick(keep=7, at=f"layers[{layer}]")
    check_against_hand(zoo.model(build), parts, method, lambda r, s, e: Hand(e, {layer: picking(e, 7)}))


@pytest.mark.parametrize("layers", [(1, 3), (0, 2), (2, 3)])
@pytest.mark.parametrize("build", zoo.BUILDS)
def test_two_stages_equal_by_hand(build, layers):
    first, second = layers
    plan = Plan((Pick(keep=9, at=f"layers[{first}]"), Pick(keep=4, at=f"layers[{second}]")))
    parts = zoo.samples(build, zoo.RAGGED)
    by_hand = lambda r, s, e: Hand(e, {first: picking(e, 9), second: picking(e, 4)})  # noqa: E731
    check_against_hand(zoo.model(build), parts, plan, by_hand)


@pytest.mark.parametrize("build", zoo.BUILDS)
def test_two_steps_at_one_point_are_their_composition(build):
    """The second sees what the first left; the order is that of the plan."""
    model, inputs = zoo.model(build), zoo.inputs(build, zoo.MIXED)
    with winnow.compress(model, Plan((Pick(keep=9), Pick(keep=4)))) as handle:
        twice, ledger = generate(model, inputs), handle.last
    with winnow.compress(model, Pick(keep=4)) as handle:
        assert same(generate(model, inputs), twice)
        for a, b in zip(handle.last.items, ledger.items, strict=True):
            assert torch.equal(a.kept, b.kept)
    for item in ledger.items:
        assert [point for point, _, _ in item.reductions] == ["projected", "projected"]
        composed = item.provenance()
        assert (composed.n, composed.m) == (item.n_visual, 4)
        assert torch.equal(composed.representatives, item.kept)


@pytest.mark.parametrize("build", zoo.BUILDS)
def test_steps_run_along_the_data_whatever_their_order_in_the_plan(build):
    model, inputs = zoo.model(build), zoo.inputs(build, zoo.RAGGED)
    early, late = Pick(keep=9, at="projected"), Pick(keep=4, at="layers[2]")
    with winnow.compress(model, Plan((early, late))):
        said = generate(model, inputs)
    with winnow.compress(model, Plan((late, early))):
        assert same(generate(model, inputs), said)


@pytest.mark.parametrize("layer", [0, 2])
@pytest.mark.parametrize("build", zoo.BUILDS)
def test_merged_rows_equal_by_hand(build, layer):
    """The mean of two neighbours stands where the first of them stood."""
    parts = zoo.samples(build, zoo.MIXED)
    check_against_hand(
        zoo.model(build), parts, Halve(at=f"layers[{layer}]"), lambda r, s, e: Hand(e, {layer: merging(e)})
    )


@pytest.mark.parametrize("build", zoo.BUILDS)
def test_a_merge_and_then_a_selection_compose(build):
    """Provenance in content ids: what is left of the pairs, and both tokens of each."""
    model, inputs = zoo.model(build), zoo.inputs(build, zoo.RAGGED)
    with winnow.compress(model, Plan((Halve(), Pick(keep=3, at="layers[2]")))) as handle:
        generate(model, inputs)
        ledger = handle.last
    for item in ledger.items:
        composed = item.provenance()
        assert (composed.n, composed.m) == (item.n_visual, 3)
        assert torch.equal(composed.representatives, item.kept)
        for row, representative in enumerate(item.kept.tolist()):
            pair = [representative, representative + 1] if representative + 1 < item.n_visual else [representative]
            assert composed.sources(row).tolist() == pair


@dataclass(frozen=True)
class EverySecond(Method):
    """Keeps every second patch of each tile, whatever it shows: the one selection that can be asked for anywhere."""

    at: str = "projected"  # type: ignore[misc]
    separators: str = "keep"
    cells: int = 25
    slug: ClassVar[str] = "every-second"

    def steps(self, info: ModelInfo) -> tuple[Step, ...]:
        run = lambda view, state: (Reduce(self.reduce(view), self.separators), state)  # noqa: E731
        return (Step(Point.of(self.at), run),)

    def reduce(self, view: View) -> Reduction:
        content = view.layout.content
        even = view.layout.cell[content] % self.cells % 2 == 0
        index = content[even] if self.at == "features" else even.nonzero()[0]  # [CLS] is a row at `features` only
        return Reduction.select(torch.from_numpy(index).expand(view.b, -1), view.n)


# Pictures that fill their tiles: of others, the patches that lie in the padding have no place in the LM.
FILLED = {"ragged": ("3 C 6", "3 C 9", "1 C 5"), "single": ("3 C 6",), "mixed": ("3 C 6", "11", "2 C 4 C 5")}


@pytest.mark.parametrize("rows", FILLED.values(), ids=FILLED)
@pytest.mark.parametrize("build", TOWERS)
def test_a_selection_at_features_is_the_same_selection_at_projected(build, rows):
    """The projector maps each row by itself, so it does not matter on which side of it a row is dropped."""
    model, inputs = zoo.model(build), zoo.inputs(build, rows)
    with winnow.compress(model, EverySecond(at="projected")) as handle:
        late, ledger = generate(model, inputs), handle.last
    with winnow.compress(model, EverySecond(at="features")) as handle:
        early = generate(model, inputs)
        assert torch.equal(early.sequences, late.sequences)
        assert (step_logits(early) - step_logits(late)).abs().max() < 1e-5
        assert handle.last.layer_tokens == ledger.layer_tokens
        for a, b in zip(handle.last.items, ledger.items, strict=True):
            assert torch.equal(a.kept, b.kept)


def test_features_are_not_offered_by_qwen2_5_vl():
    """Its merger joins four patches, so that single ones cannot leave before it."""
    with pytest.raises(winnow.UnsupportedError, match=r"features.*projected, layers"):
        winnow.compress(zoo.model("qwen2_5_vl"), Pick(at="features"))


@pytest.mark.parametrize("build", TOWERS)
def test_features_then_two_decoder_stages_equal_by_hand(build):
    """Later steps see the tokens in the LM's order, whatever the order of the tower, and know which ones they are."""
    plan = Plan((EverySecond(at="features"), Pick(keep=9, at="layers[1]"), Pick(keep=4, at="layers[2]")))

    def by_hand(reference: Reference, sample: dict, entry: Entry) -> Hand:
        even = [(cells % reference.cells % 2 == 0).nonzero()[:, 0] for cells in entry.cells]
        door = cut(entry, lambda number, rows, seen: rows[even[number]])
        return Hand(entry, {0: door, 1: picking(entry, 9), 2: picking(entry, 4)})

    check_against_hand(zoo.model(build), zoo.samples(build, FILLED["mixed"]), plan, by_hand)


@pytest.mark.parametrize("point", ["features", "projected", "layers[1]"])
@pytest.mark.parametrize("build", TOWERS)
def test_newlines_stay_or_go_as_the_action_says(build, point):
    """Ten rows of a mosaic of 2 × 2 tiles; the other families have none."""
    model, inputs = zoo.model(build), zoo.inputs(build, FILLED["single"])
    found = {}
    for separators in ("keep", "drop"):
        with winnow.compress(model, EverySecond(at=point, separators=separators)) as handle:
            forward(model, inputs)
            found[separators] = handle.last.layer_tokens[-1][0]
    newlines = 10 if build == "llava_next" else 0
    content = 13 * (5 if build == "llava_next" else 1)
    text = inputs["input_ids"].shape[1] - zoo.tokens_of(build, "C")
    assert found == {"keep": text + content + newlines, "drop": text + content}
