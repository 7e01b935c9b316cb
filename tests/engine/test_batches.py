"""A batch gives what its samples give alone: selection, logits, and nothing from its neighbours or its padding."""

from __future__ import annotations

import pytest
import torch
import zoo
from byhand import Hand, cut
from cases import CASES, SOME, check_against_hand, pairs, picking, same
from probes import Look, Pick, forward, generate, new_tokens, step_logits

import winnow
from winnow.core.budget import Budget
from winnow.core.plan import Plan
from winnow.signals.language import LMAttention
from winnow.signals.vision import VisionAttention

CROWD = ("3 A 6", "11", "3 B 9", "2 B 4 C 5", "3 A 6", "1 A 1 A 2", "7 C 1", "2 A")


def kept_by_row(model, inputs, plan) -> dict[int, list[list[int]]]:
    with winnow.compress(model, plan) as handle:
        forward(model, inputs)
        found: dict[int, list[list[int]]] = {row: [] for row in range(len(inputs["input_ids"]))}
        for item in handle.last.items if handle.last else ():
            found[item.row].append(item.kept.tolist())
    return found


@pytest.mark.parametrize(("kind", "build"), pairs())
def test_a_batch_is_each_of_its_samples_alone(kind, build):
    """Pictures of several sizes, none, one, two, one behind all text; no cut of these is closer than rounding."""
    model, parts = zoo.model(build), zoo.samples(build, CROWD)
    with winnow.compress(model, CASES[kind].plan) as handle:
        together = forward(model, zoo.collate(parts)).logits[:, -1]
        kept = [(item.row, item.kept.tolist()) for item in handle.last.items]
        for row, part in enumerate(parts):
            alone = forward(model, part).logits[0, -1]
            assert (together[row] - alone).abs().max() <= 1e-5, f"row {row}"
            own = [item.kept.tolist() for item in handle.last.items]
            assert [ids for r, ids in kept if r == row] == own, f"row {row}"


@pytest.mark.full
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["float32", "float64"])
@pytest.mark.parametrize(("kind", "build"), pairs())
def test_selection_in_many_batches_differs_in_less_than_half_a_percent(kind, build, dtype):
    """Thirty batches of other pictures: in fp32 0.5 % of the items may differ (ties by rounding), in fp64 none."""
    model, plan = zoo.model(build, dtype=dtype), CASES[kind].plan
    differ = total = 0
    for seed in range(30):
        parts = zoo.samples(build, CROWD, seed=100 * seed, dtype=dtype)
        together = kept_by_row(model, zoo.collate(parts), plan)
        for row, part in enumerate(parts):
            alone = kept_by_row(model, part, plan)[0]
            total += len(alone)
            differ += sum(a != b for a, b in zip(together[row], alone, strict=True))
    assert total == 30 * 9
    assert differ <= (0 if dtype is torch.float64 else 0.005 * total)


@pytest.mark.parametrize(("kind", "build"), pairs(SOME))
def test_more_left_padding_changes_nothing(kind, build):
    model, parts = zoo.model(build), zoo.samples(build, zoo.MIXED)
    plan = CASES[kind].plan
    few, many = zoo.collate(parts), zoo.collate(parts, extra=7)
    assert kept_by_row(model, few, plan) == kept_by_row(model, many, plan)
    with winnow.compress(model, plan):
        a, b = generate(model, few), generate(model, many)
    assert torch.equal(new_tokens(a, few), new_tokens(b, many))
    assert (step_logits(a) - step_logits(b)).abs().max() <= 1e-5


@pytest.mark.parametrize(("kind", "build"), pairs(SOME))
def test_garbage_in_the_padding_changes_nothing(kind, build):
    """Ids under the padding are never looked at; those of pictures cannot be there, the model itself counts them."""
    model, inputs = zoo.model(build), zoo.inputs(build, zoo.RAGGED)
    padding = inputs["attention_mask"] == 0
    assert padding.any()
    garbage = {**inputs, "input_ids": inputs["input_ids"].masked_fill(padding, 77)}
    with winnow.compress(model, CASES[kind].plan):
        clean = generate(model, inputs)
        dirty = generate(model, garbage)
    assert torch.equal(new_tokens(clean, inputs), new_tokens(dirty, inputs))
    assert torch.equal(step_logits(clean), step_logits(dirty))


@pytest.mark.parametrize(("kind", "build"), pairs(SOME))
def test_permuting_the_samples_permutes_the_outputs(kind, build):
    model, parts = zoo.model(build), zoo.samples(build, CROWD)
    order = [5, 2, 7, 0, 3, 6, 1, 4]
    plan = CASES[kind].plan
    straight, mixed = zoo.collate(parts), zoo.collate([parts[i] for i in order])
    with winnow.compress(model, plan):
        a, b = generate(model, straight), generate(model, mixed)
    assert (step_logits(a)[order] - step_logits(b)).abs().max() <= 1e-5
    first, second = kept_by_row(model, straight, plan), kept_by_row(model, mixed, plan)
    assert [first[i] for i in order] == [second[i] for i in range(len(order))]


@pytest.mark.parametrize("point", ["projected", "layers[2]"])
@pytest.mark.parametrize("build", zoo.BUILDS)
def test_all_tokens_of_all_pictures_can_go(build, point):
    """Newlines go with the last content token; the text around the pictures stays."""
    layer = 0 if point == "projected" else 2
    none = Budget(0, allow_empty=True)

    def by_hand(reference, sample, entry):
        return Hand(entry, {layer: cut(entry, lambda number, rows, seen: rows[:0])})

    check_against_hand(zoo.model(build), zoo.samples(build, zoo.MIXED), Pick(keep=none, at=point), by_hand)


@pytest.mark.parametrize("point", ["projected", "layers[2]"])
@pytest.mark.parametrize("build", zoo.BUILDS)
def test_a_single_token_can_stay(build, point):
    layer = 0 if point == "projected" else 2
    by_hand = lambda r, s, e: Hand(e, {layer: picking(e, 1)})  # noqa: E731
    check_against_hand(zoo.model(build), zoo.samples(build, zoo.MIXED), Pick(keep=1, at=point), by_hand)


@pytest.mark.parametrize(("kind", "build"), pairs(SOME))
def test_a_batch_of_text_only_is_the_plain_model(kind, build):
    model, inputs = zoo.model(build), zoo.inputs(build, ("5", "9", "7"))
    plain = generate(model, inputs)
    with winnow.compress(model, CASES[kind].plan):
        assert same(generate(model, inputs), plain)


@pytest.mark.parametrize("build", zoo.BUILDS)
def test_two_pictures_of_one_row_are_two_items(build):
    """Each has a budget of its own, and the same picture twice is chosen from twice."""
    model = zoo.model(build)
    part = zoo.sample(build, "2 A 4 A 5")
    for name in ("pixel_values", "image_sizes", "image_grid_thw"):
        if name in part:
            half = len(part[name]) // 2
            part[name] = torch.cat([part[name][:half]] * 2)
    with winnow.compress(model, Pick(keep=5)) as handle:
        forward(model, part)
        first, second = handle.last.items
    assert first.kept.tolist() == second.kept.tolist()
    assert len(first.kept) == 5


@pytest.mark.parametrize("build", zoo.BUILDS)
def test_views_hold_items_of_equal_size_without_padding(build):
    """Nine pictures of three sizes: every one is seen once, in a dense view of its own kind."""
    model, inputs = zoo.model(build), zoo.inputs(build, CROWD)
    look = Look()
    with winnow.compress(model, look):
        forward(model, inputs)
    assert sum(view.b for view in look.views) == 9
    for view in look.views:
        assert view.tokens.shape == (view.b, view.layout.n_content, 64)
        assert view.n_visual == view.layout.n_content
        assert torch.equal(view.ids, torch.arange(view.n).expand(view.b, -1))


@pytest.mark.parametrize("build", ["llava_next", "qwen2_5_vl"])
def test_pictures_of_equal_length_and_other_shape_are_not_mixed_up(build):
    """B and the same turned have as many tokens and other neighbours: one must not be taken for the other."""
    model, parts = zoo.model(build), zoo.samples(build, ("3 B 6", "3 T 6", "2 T 1 B 4"))
    look = Look()
    with winnow.compress(model, look):
        forward(model, zoo.collate(parts))
    assert sorted((view.b, view.n) for view in look.views) == [(2, view.n) for view in look.views]
    assert len({view.layout for view in look.views}) == len(look.views) == 2
    check_against_hand(model, parts, *CASES["received"])


@pytest.mark.parametrize("build", zoo.BUILDS)
def test_the_ledger_speaks_of_each_row(build):
    model, inputs = zoo.model(build), zoo.inputs(build, zoo.MIXED)
    with winnow.compress(model, Plan((Pick(keep=6), Pick(keep=2, at="layers[3]")))) as handle:
        generate(model, inputs)
        ledger = handle.last
    real = inputs["attention_mask"].sum(1).tolist()
    assert list(ledger.logical) == real
    assert [item.row for item in ledger.items] == [0, 2, 2]
    assert [item.modality for item in ledger.items] == ["image"] * 3
    content = [item.layout.n_content for item in ledger.items]
    gone = [content[0] - 6, 0, content[1] + content[2] - 12]
    assert list(ledger.layer_tokens[0]) == [n - g for n, g in zip(real, gone, strict=True)]
    assert list(ledger.layer_tokens[3]) == [n - g - d for n, g, d in zip(real, gone, (4, 0, 8), strict=True)]
    assert ledger.positions == "keep"


@pytest.mark.parametrize("build", zoo.BUILDS)
def test_signals_of_a_batch_are_those_of_each_sample_alone(build):
    """In float64, so that equal means equal: no neighbour and no padding takes part in an attention."""
    model, parts = zoo.model(build, dtype=torch.float64), zoo.samples(build, CROWD, dtype=torch.float64)
    needs = (VisionAttention(1, query="all"), LMAttention(1), LMAttention(1, rows="question"))
    look = Look(needs=needs, at="layers[2]")
    with winnow.compress(model, look):
        forward(model, zoo.collate(parts))
        together = {signal: look.seen(signal) for signal in needs}
        sizes = [view.n for view in look.views for _ in range(view.b)]
        look.views.clear()
        for part in parts:
            forward(model, part)
        alone = {signal: look.seen(signal) for signal in needs}
    for signal in needs:
        assert sorted(len(x) for x in together[signal]) == sorted(sizes)
        for x in alone[signal]:
            assert min(float((x - y).abs().max()) for y in together[signal] if len(y) == len(x)) < 1e-6
