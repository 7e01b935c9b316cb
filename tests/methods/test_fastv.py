"""FastV by its card: after K layers, the share of image tokens that the last prompt token attends to most."""

from __future__ import annotations

import pytest
import torch

from winnow.core.errors import WinnowError
from winnow.core.info import ModelInfo
from winnow.core.step import State
from winnow.core.view import View
from winnow.methods.fastv import FastV
from winnow.signals.language import LMAttention

from .stubs import STUBS, check_tiles_are_one_pool, ids, scores, tokens

LLAMA = ModelInfo(model="Llama", depth=32)


@pytest.mark.system("fastv", "exact")
def test_golden_indices_stay_in_order():
    row = torch.tensor([[0.3, 0.1, 0.9, 0.2, 0.8, 0.0]])
    assert ids(FastV(keep="50%").reduce(View.of(tokens(0, 6), row))) == [0, 2, 4]


def _keeps_the_attended(reduce):
    for seed in range(5):
        row = scores(seed, 30)
        assert ids(reduce(View.of(tokens(0, 30), row), 9)) == row[0].topk(9).indices.sort().values.tolist()


@pytest.mark.system("fastv", "exact")
def test_kept_are_those_that_the_last_token_attends_to():
    _keeps_the_attended(lambda view, k: FastV(keep=k).reduce(view))


@pytest.mark.parametrize("stub", STUBS)
def test_kept_fails_for_a_stub(stub):
    with pytest.raises(AssertionError):
        _keeps_the_attended(stub)


@pytest.mark.system("fastv", "exact")
def test_nothing_dropped_is_the_identity_bit_for_bit():
    x = tokens(0, 30)
    assert torch.equal(FastV(keep="100%").reduce(View.of(x, scores(0, 30))).apply(x), x)


@pytest.mark.parametrize(
    ("n", "keep", "m"), [(576, "50%", 288), (576, 0.25, 144), (25, "50%", 12), (27, "50%", 14), (3, 0.1, 1)]
)
def test_halves_round_to_even_as_in_the_code(n, keep, m):
    assert FastV(keep=keep).reduce(View.of(tokens(0, n), scores(0, n))).m == m


@pytest.mark.system("fastv", "exact")
@pytest.mark.parametrize("layer", [1, 2, 3, 31])
def test_it_acts_before_layer_k_on_the_attention_of_the_layer_before(layer):
    (step,) = FastV(layer=layer).checked_steps(LLAMA)
    assert str(step.at) == f"layers[{layer}]"
    assert step.needs == (LMAttention(layer - 1, rows="last"),)


def test_layer_zero_drops_at_random_with_the_seed_of_the_plan():
    (step,) = FastV(layer=0, keep=10).checked_steps(LLAMA)
    assert (str(step.at), step.needs) == ("layers[0]", ())
    kept = [ids(step.act(View.of(tokens(0, 50), seed=seed), State())[0].reduction) for seed in (0, 0, 1)]
    assert kept[0] == kept[1] != kept[2]
    assert kept[0] not in ([*range(10)], [*range(0, 50, 5)])


def test_tiles_are_one_pool():
    check_tiles_are_one_pool(lambda view, k: FastV(keep=k).reduce(view))


def test_share_is_of_the_tokens_at_entry_not_of_what_is_left():
    view = View.of(tokens(0, 20), scores(0, 20), n_visual=30)
    assert FastV(keep="50%").reduce(view).m == 15


def test_layer_beyond_the_model_is_refused():
    with pytest.raises(WinnowError, match=r"32 LM layers.*0 … 31"):
        FastV(layer=32).checked_steps(LLAMA)
