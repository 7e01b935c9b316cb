"""FitPrune: as many tokens as a recipe says leave behind each layer, by the attention of image and text."""

from __future__ import annotations

from itertools import accumulate

import pytest
import torch

from winnow.core.errors import WinnowError
from winnow.core.info import ModelInfo
from winnow.core.packing import Packing
from winnow.core.plan import Plan
from winnow.core.step import State
from winnow.core.view import View
from winnow.methods.fitprune import FitPrune, LargestHeads
from winnow.parts.recipes import RECIPES
from winnow.signals.language import LMAttentionInputs, TextSpans

from .directional import at_random, blind_cuts, evenly, gap
from .stubs import (
    STUBS,
    chain,
    check_keeps_largest,
    check_ties_and_broken_values,
    check_tiles_are_one_pool,
    ids,
    scores,
    tokens,
)

LLAMA = ModelInfo(model="Llama", depth=32)


def code(drops, scored, n):
    """The released code's loop: each layer drops so many of the lowest products."""
    held, found = list(range(n)), []
    for layer, drop in enumerate(drops):
        gone = sorted(held, key=lambda j: scored[layer][0, j].item())[:drop]
        held = [j for j in held if j not in gone]
        found.append(held)
    return found


@pytest.mark.system("fitprune", "exact")
@pytest.mark.parametrize("reduction", sorted(RECIPES[576]))
def test_released_code_on_its_576_tokens(reduction):
    drops = RECIPES[576][reduction].drops
    scored = {layer: scores(layer, 576) for layer in range(32)}
    (method,) = Plan.of(f"fitprune:released,reduction={reduction}").methods
    found, want = chain(method, scored, LLAMA), code(drops, scored, 576)
    assert sorted(found) == [layer + 1 for layer, drop in enumerate(drops) if drop]
    assert all(step.needs == (LargestHeads(step.at.index - 1),) for step in method.bind(LLAMA)[1])
    assert all(held[0].tolist() == want[layer - 1] for layer, held in found.items())


@pytest.mark.system("fitprune", "exact")
@pytest.mark.parametrize("n", [2880, 2144, 1500])
@pytest.mark.parametrize("reduction", [40, 60])
def test_released_code_for_llava_next_scales_each_drop_down(reduction, n):
    drops = [int(drop * n / 2880) for drop in RECIPES[2880][reduction].drops]
    scored = {layer: scores(layer, n) for layer in range(32)}
    (method,) = Plan.of(f"fitprune:released,fitted=2880,reduction={reduction}").methods
    found, want = chain(method, scored, LLAMA), code(drops, scored, n)
    assert all(held[0].tolist() == want[layer - 1] for layer, held in found.items())


def test_recipes_are_those_that_were_released():
    """Tokens that are left of 576, and of 2,880, behind the last layer."""
    ends = {saved: recipe.left(recipe.of, 32) for saved, recipe in RECIPES[576].items()}
    assert ends == {10: 510, 20: 427, 30: 312, 40: 240, 50: 173, 55: 152, 60: 127, 70: 88, 80: 62, 90: 37}
    assert {saved: recipe.left(2880, 32) for saved, recipe in RECIPES[2880].items()} == {40: 1368, 60: 784}
    assert {len(recipe.drops) for own in RECIPES.values() for recipe in own.values()} == {32}


SPANS = TextSpans([(9, 12), (8, 12)], [7, 6], [torch.tensor([1, 2, 3, 5, 6]), torch.tensor([2, 3, 4, 5])])


def naive(weights, items, text):
    """`[H, n, n]` → for each token the sum over rows of the largest of the heads, of image times of text."""
    heads, n, _ = weights.shape

    def of(rows, j):
        return sum(max(weights[h, i, j].item() for h in range(heads)) for i in rows)

    return [of(items, j) * (of(text, j) if text else 1) for j in range(n)]


@pytest.mark.system("fitprune", "exact")
@pytest.mark.parametrize("right", [False, True], ids=["left-padded", "right-padded"])
def test_the_signal_is_the_product_of_image_and_text(right):
    """A second row that is shorter by two, padded on either side; grouped keys."""
    generator = torch.Generator().manual_seed(0)
    q, k = torch.randn(2, 4, 12, 8, generator=generator), torch.randn(2, 2, 12, 8, generator=generator)
    mask = torch.ones(2, 12, dtype=torch.bool)
    real = range(10) if right else range(2, 12)
    mask[1, [i for i in range(12) if i not in real]] = False
    spans = SPANS if right else TextSpans(SPANS.questions, [7, 8], [SPANS.items[0], SPANS.items[1] + 2])
    seen = LMAttentionInputs(q, k, 0.3, Packing.of(mask, (12, 10), right), None, spans)
    found = LargestHeads(0).read(seen)
    for b, own in enumerate((range(12), real)):
        at = torch.tensor([*own])
        logits = q[b][:, at] @ k[b].repeat_interleave(2, 0)[:, at].mT * 0.3
        weights = logits.masked_fill(torch.ones(len(at), len(at)).triu(1).bool(), -torch.inf).softmax(-1)
        items = [own.index(i) for i in spans.items[b].tolist()]
        want = naive(weights, items, range(own.index(spans.ends[b]), len(own)))
        torch.testing.assert_close(found[b, at], torch.tensor(want), rtol=1e-4, atol=1e-6)


def test_without_text_behind_the_image_it_is_what_the_image_attends_to():
    q, k = (torch.randn(1, 2, 6, 8, generator=torch.Generator().manual_seed(seed)) for seed in (0, 1))
    packing = Packing.of(torch.ones(1, 6, dtype=torch.bool), (6,))
    items = torch.arange(2, 6)
    found = LargestHeads(0).read(
        LMAttentionInputs(q, k, 0.3, packing, None, TextSpans([(0, 2)], [6], [items])),
    )
    weights = (q[0] @ k[0].mT * 0.3).masked_fill(torch.ones(6, 6).triu(1).bool(), -torch.inf).softmax(-1)
    torch.testing.assert_close(found[0], torch.tensor(naive(weights, items.tolist(), [])))


def choose(view, k):
    return FitPrune().cut(view, LargestHeads(0), k)


@pytest.mark.system("fitprune", "exact")
def test_kept_are_the_largest_products():
    check_keeps_largest(choose)


@pytest.mark.parametrize("stub", STUBS)
def test_kept_fails_for_a_stub(stub):
    with pytest.raises(AssertionError):
        check_keeps_largest(stub)


def test_ties_nan_and_half_precision():
    check_ties_and_broken_values(choose, (torch.nan, torch.nan))
    row = scores(0, 40).bfloat16()
    both = [ids(choose(View.of(tokens(0, 40), x), 9)) for x in (row, row.float())]
    assert both[0] == both[1]


def test_tiles_are_one_pool():
    check_tiles_are_one_pool(choose)


@pytest.mark.parametrize("depth", [1, 2, 8, 28, 32, 40])
def test_on_other_depths_layers_at_the_same_share_are_done(depth):
    recipe = FitPrune().recipe
    gone = [0, *accumulate(recipe.drops)]
    found, n = recipe.cuts(depth), 576
    left = n
    for layer in range(1, depth):
        want = n - gone[layer * 32 // depth]
        assert (layer in found) == (want < left)
        left = want
        assert layer not in found or recipe.left(n, found[layer]) == want


def test_counts_are_of_what_entered_the_lm_and_never_none():
    (step,) = FitPrune(drops=(288, 0)).bind(ModelInfo(depth=2))[1]
    row = scores(0, 20)
    act = lambda n_lm: step.act(View.of(tokens(0, 20), row, n_visual=80, n_lm=n_lm), State())[0]  # noqa: E731
    assert (act(30).reduction.m, act(60).reduction.m) == (15, 20)
    assert FitPrune(drops=(600, 0)).kept(576, 1, 1) == 1


def test_an_own_recipe_takes_the_place_of_a_released_one():
    steps = FitPrune(drops=(0, 10, 0, 5)).bind(ModelInfo(depth=4))[1]
    assert [step.at.index for step in steps] == [2]  # what the last layer drops nobody reads
    assert FitPrune(drops=(0, 0)).bind(ModelInfo(depth=4))[1] == ()


@pytest.mark.parametrize("budget", [32, "12.5%", 500, "100%", 1])
def test_at_a_budget_the_nearest_recipe_ends_there(budget):
    method = FitPrune().at_budget(budget, 576)
    nearest = {32: 90, "12.5%": 80, 500: 10, "100%": 10, 1: 90}
    assert method.reduction == nearest[budget]
    found = chain(method, {layer: scores(layer, 576) for layer in range(32)}, LLAMA)
    lengths = [held.shape[1] for held in found.values()]
    assert lengths == sorted(lengths, reverse=True)
    assert lengths[-1] == method.left.of(576)
    assert Plan.of(str(Plan((method,)))).methods[0] == method


@pytest.mark.parametrize(
    "settings",
    [{"reduction": 25}, {"fitted": 2880, "reduction": 50}, {"fitted": 577}, {"drops": ()}, {"drops": (-1,)}],
)
def test_wrong_settings(settings):
    with pytest.raises(WinnowError, match="allowed"):
        FitPrune(**settings)


def cuts(sample, k, select=at_random):
    """The same cuts by a blind choice."""
    method, info = FitPrune().at_budget(k, 256), sample.handle.info
    done = method.recipe.cuts(info.depth)
    return blind_cuts(select, tuple(done), [method.kept(256, d, max(done.values())) for d in done.values()])


def _finds_evidence(sample, plan):
    assert gap(sample.left(plan), sample.left(cuts(sample, 32))).low > 0.1


@pytest.mark.system("fitprune", "directional")
@pytest.mark.xdist_group("samples")
def test_what_image_and_text_attend_to_is_evidence(few):
    _finds_evidence(few, FitPrune().at_budget(32, 256))


@pytest.mark.xdist_group("samples")
@pytest.mark.parametrize("stub", [evenly, at_random])
def test_finding_fails_for_a_stub(few, stub):
    with pytest.raises(AssertionError):
        _finds_evidence(few, cuts(few, 32, stub))
