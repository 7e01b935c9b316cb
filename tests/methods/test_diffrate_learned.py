"""The search of DiffRate: what it sees equals what is removed in the end, and what it ends with is worth its price."""

from __future__ import annotations

import json

import pytest
import torch
from torch.nn.functional import cross_entropy
from torch.utils.flop_counter import FlopCounterMode

import winnow
from tests.methods.directional import gap
from winnow import reference
from winnow.core.errors import WinnowError
from winnow.core.info import ModelInfo
from winnow.core.plan import Plan
from winnow.engine.compress import compress
from winnow.learn.pruners import diffrate as searching
from winnow.learn.pruners.diffrate import Recipe, counts_with_gradient, flops, share_of_flops, uniform
from winnow.learn.pruners.frozen import Frozen, questions
from winnow.methods.diffrate import DiffRate
from winnow.parts.learned import SHIPPED

SHAPE = (256, 192, 768)  # of the reference model's tower
FACTS = SHIPPED / "diffrate.json"


@pytest.fixture(scope="module")
def frozen():
    model, processor = reference.load()
    model.set_attn_implementation("eager")
    with compress(model, Plan(()), processor=processor) as handle:
        yield Frozen(handle, processor, questions(4, seed=1))


def scrambled(recipe, seed):
    schedule = recipe.make()
    generator = torch.Generator().manual_seed(seed)
    for parameter in schedule.parameters():
        torch.nn.init.normal_(parameter, std=2, generator=generator)
    return schedule


def _masked_is_removed(frozen, scale=1.0):
    """The loss with masks is the loss with all that they hide removed."""
    recipe = Recipe(frozen, scale)
    for number, example in enumerate(frozen.examples(0, 3)):
        schedule = scrambled(recipe, number)
        prune, merge = schedule.counts()
        assert merge[-1] < 256
        with torch.no_grad():
            want = cross_entropy(frozen.said(example, DiffRate(prune=prune, merge=merge)), example.answer)
            assert abs(recipe.masked(schedule, number) - want) <= 2e-4 * (1 + want)


@pytest.mark.system("diffrate", "exact")
def test_masks_of_the_search_are_what_the_method_removes(frozen, monkeypatch):
    """Masked keys keep a trace for the gradients, of which less is left here."""
    monkeypatch.setattr(searching, "LEAST", 1e-12)
    _masked_is_removed(frozen)


@pytest.mark.parametrize("what", ["merged", "soft_keys"])
def test_the_equality_fails_where_merging_or_the_language_model_is_left_out(frozen, what, monkeypatch):
    if what == "merged":

        def nothing(x, gone, part, kept, size):
            return torch.eye(x.shape[1]).expand(len(x), -1, -1), torch.zeros_like(size)

        monkeypatch.setattr(searching, "merged", nothing)
    else:
        keys = searching.soft_keys
        monkeypatch.setattr(searching, "soft_keys", lambda layers, gate: keys(layers, lambda *_: None))
    with pytest.raises(AssertionError):
        _masked_is_removed(frozen)


@pytest.mark.system("diffrate", "exact")
def test_with_all_mass_on_all_tokens_the_search_is_the_full_model(frozen):
    recipe = Recipe(frozen, 1.0)
    schedule = recipe.make()
    with torch.no_grad():
        for parameter in schedule.parameters():
            parameter[0] = 1e3
        (example,) = frozen.examples(0, 1)
        whole = cross_entropy(frozen.said(example), example.answer)
        assert abs(recipe.masked(schedule, 0) - whole) <= 1e-4
    assert share_of_flops(schedule.counts()[1], *SHAPE) == 1


@pytest.mark.system("diffrate", "exact")
def test_the_formula_gives_the_flops_that_are_counted():
    model, _ = reference.load()
    model.set_attn_implementation("eager")
    method = DiffRate(prune=(256, 200, 120, 60, 60), merge=(256, 150, 120, 40, 40), proportional=False)
    with winnow.compress(model, method), torch.no_grad(), FlopCounterMode(display=False) as counter:
        model.get_image_features(pixel_values=torch.zeros(1, 3, 224, 224))
    counted = {name: sum(own.values()) for name, own in counter.get_flop_counts().items()}
    pruned, left = [256, 200, 120, 60, 40], [256, 256, 150, 120, 40, 40]
    for block in range(5):
        want = 2 * flops(1 + left[block], 1 + left[block + 1], 192, 768)
        want += 2 * (1 + left[block]) * 192  # the row of [CLS], which is read beside the attention
        want += 2 * (pruned[block] - left[block + 1]) * (1 + left[block + 1]) * 192  # cosines
        assert counted[f"CLIPVisionModel.encoder.layers.{block}"] == want


@pytest.mark.system("diffrate", "exact")
def test_the_price_and_the_answer_reach_every_logit(frozen):
    recipe = Recipe(frozen, 1.0)
    schedule = recipe.make()
    price = share_of_flops(counts_with_gradient(schedule), *SHAPE)
    for part in (price, recipe.masked(schedule, 1)):
        grads = torch.autograd.grad(part, list(schedule.parameters()))
        assert all((g != 0).all() for g in grads) if part is price else all((g != 0).any() for g in grads)


def test_the_uniform_schedule_is_found_by_its_flops():
    for left in (1, 20, 90):
        counts = [256 - (256 - left) * block // 4 for block in range(5)]
        assert uniform(float(share_of_flops(counts, *SHAPE)), 5, *SHAPE) == (left, counts)


def test_learned_weights_become_plain_counts():
    info = ModelInfo(vision_depth=6, feature_layer=-2)
    method = DiffRate(weights="shipped" if FACTS.exists() else "untrained").resolve(info)
    assert method.weights is None
    assert len(method.prune) == len(method.merge) == 5
    untrained = DiffRate(weights="untrained").resolve(info)
    assert [int(str(b)) for b in untrained.merge] == [256, 130, 130, 130, 130]
    with pytest.raises(WinnowError, match="another model"):
        DiffRate(weights="shipped").resolve(ModelInfo(vision_depth=6, fingerprint=lambda: "0"))


def shipped():
    facts = json.loads(FACTS.read_text(encoding="utf-8"))
    return facts, facts["settings"]["merge"]


@pytest.mark.system("diffrate", "directional")
def test_the_search_meets_its_target_and_takes_more_away_from_block_to_block():
    facts, merge = shipped()
    assert abs(share_of_flops(merge, *SHAPE) - searching.TARGET) < 0.02 * searching.TARGET
    assert merge == sorted(merge, reverse=True)
    assert facts["measured"]["trained"]["flops"] == pytest.approx(share_of_flops(merge, *SHAPE), abs=1e-4)


@pytest.mark.system("diffrate", "directional")
@pytest.mark.xdist_group("samples")
def test_the_learned_schedule_answers_more_than_the_uniform_one_of_as_many_flops(sample):
    _, merge = shipped()
    left, counts = uniform(float(share_of_flops(merge, *SHAPE)), 5, *SHAPE)
    assert share_of_flops(counts, *SHAPE) >= share_of_flops(merge, *SHAPE) - 0.003
    assert gap(sample.right("diffrate:weights=shipped"), sample.right(f"diffrate:left={left}")).low > 0
