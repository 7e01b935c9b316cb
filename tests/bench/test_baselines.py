"""Baselines keep what they say they keep."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from winnow.bench.baselines import Chosen, Downsample, Uniform, baseline_plan, choose, choosing, uniform_ids
from winnow.bench.tasks import Ask
from winnow.core.budget import Budget
from winnow.core.errors import WinnowError
from winnow.core.layout import Layout, grid_rows
from winnow.core.view import View
from winnow.signals.sound import SoundLevel
from winnow.signals.vision import Pixels
from winnow.world.sounds import mel_tokens, sound

SQUARE = Layout.grid(16, 16)
ASK = Ask("q", "count", "how many?", "2", "world:test:0:224")
EVIDENCE = ((0.0, 0.0, 0.25, 0.25),)  # 16 of the 256 tokens
OBJECTS = (*EVIDENCE, (0.5, 0.5, 0.75, 0.75))


def two_grids(h, w):
    """A thumbnail and a mosaic of twice its sides."""
    return Layout.of(("two", h, w), [grid_rows(h, w), grid_rows(2 * h, 2 * w, grid=1, tile=1)])


@given(st.integers(1, 24), st.integers(1, 24), st.data())
def test_uniform_keeps_m_different_tokens_of_any_grid(h, w, data):
    m = data.draw(st.integers(1, h * w))
    ids = uniform_ids(Layout.grid(h, w), m)
    assert len(set(ids)) == m
    assert list(ids) == sorted(ids)
    assert set(ids) <= set(range(h * w))


def test_uniform_is_even():
    rows, cols = np.divmod(np.array(uniform_ids(SQUARE, 64)), 16)
    assert (np.bincount(rows, minlength=16) > 0).sum() == 8
    assert (np.bincount(cols, minlength=16) > 0).sum() == 8
    assert set(np.diff(np.unique(rows))) == set(np.diff(np.unique(cols))) == {2}


def test_uniform_shares_the_budget_between_grids():
    layout = two_grids(4, 4)
    ids = np.array(uniform_ids(layout, 16))
    assert (ids < 16).sum() == 8


@given(st.integers(1, 12), st.integers(1, 12), st.data())
def test_downsample_means_by_area_and_stays_within_the_budget(h, w, data):
    m = data.draw(st.integers(1, h * w))
    x = torch.randn(2, h * w, 3, dtype=torch.float64)
    reduction = Downsample(Budget(m)).reduce(View.of(x, layout=Layout.grid(h, w)))
    assert 1 <= reduction.m <= m
    assert reduction.is_stochastic
    representatives = reduction.representatives[0].tolist()
    assert representatives == sorted(set(representatives))
    # Every patch weighs the same in the whole, as it does in a picture made smaller.
    assert torch.allclose(reduction.to_matrix(torch.float64).mean(-2), torch.tensor(1 / (h * w), dtype=torch.float64))


def test_downsample_is_average_pooling_where_sides_divide():
    x = torch.randn(1, 256, 5)
    got = Downsample(Budget(16)).reduce(View.of(x, layout=SQUARE)).apply(x)
    picture = x.transpose(1, 2).reshape(1, 5, 16, 16)
    want = torch.nn.functional.adaptive_avg_pool2d(picture, 4).flatten(2).transpose(1, 2)
    assert torch.allclose(got, want, atol=1e-6)


def test_random_differs_between_questions_and_not_between_runs():
    def draw(name, seed):
        ask = Ask(name, "count", "how many?", "2", "world:test:0:224")
        return choose("random", ask, SQUARE, 20, (), (), seed)[1]

    assert draw("a", 0) == draw("a", 0)
    assert len({draw("a", 0), draw("b", 0), draw("a", 1)}) == 3
    assert all(len(set(draw(name, 0))) == 20 for name in "abc")


def test_the_ceiling_takes_all_evidence_then_other_objects_then_anything():
    matters, company = (set(np.flatnonzero(SQUARE.covering(boxes)).tolist()) for boxes in (EVIDENCE, OBJECTS))
    _, few = choose("ceiling", ASK, SQUARE, 10, EVIDENCE, OBJECTS)
    assert set(few) < matters
    _, some = choose("ceiling", ASK, SQUARE, 24, EVIDENCE, OBJECTS)
    assert matters < set(some) < company
    _, many = choose("ceiling", ASK, SQUARE, 64, EVIDENCE, OBJECTS)
    assert company < set(many)
    assert [len(x) for x in (few, some, many)] == [10, 24, 64]


def test_the_oracle_takes_evidence_only_and_the_whole_picture_for_an_absence():
    matters = set(np.flatnonzero(SQUARE.covering(EVIDENCE)).tolist())
    assert set(choose("oracle", ASK, SQUARE, 64, EVIDENCE, OBJECTS)[1]) == matters
    assert choose("oracle", ASK, SQUARE, 64, (), OBJECTS)[1] == uniform_ids(SQUARE, 64)


def test_choices_belong_to_the_samples_of_their_layout_in_order():
    other = Layout.grid(2, 3)
    chosen = Chosen("ceiling", Budget(2))
    given_ids = [(SQUARE, (1, 5)), (other, (0,)), (SQUARE, (7,))]
    with choosing(given_ids):
        square = chosen.reduce(View.of(torch.zeros(2, 256, 1), layout=SQUARE))
        small = chosen.reduce(View.of(torch.zeros(1, 6, 1), layout=other))
        with pytest.raises(WinnowError, match="2 choices were given for 1"):
            chosen.reduce(View.of(torch.zeros(1, 256, 1), layout=SQUARE))
    assert [square.lane(i).index.tolist() for i in range(2)] == [[1, 5], [7]]
    assert small.index.tolist() == [[0]]
    with pytest.raises(WinnowError, match="0 choices"):
        chosen.reduce(View.of(torch.zeros(1, 256, 1), layout=SQUARE))


def test_the_loudest_tokens_of_a_sound_stay_in_their_order():
    level = torch.tensor([[0.1, 3.0, 0.2, 2.0, 5.0, 0.3]])
    (method,) = baseline_plan("drop-low-energy", 3).methods
    kept = method.reduce(View.of(torch.zeros(1, 6, 2), level, layout=Layout.sound(6, 0.04)))
    assert kept.index.tolist() == [[1, 3, 4]]
    with pytest.raises(WinnowError, match="baseline of sounds"):
        method.reduce(View.of(torch.zeros(1, 6, 2), level, layout=Layout.grid(2, 3)))


def test_silence_leaves_first():
    """Of drawn sounds: what is left is nearly all of events, and not of the silence between them."""
    for seed in range(5):
        made = sound(seed, "words")
        x = torch.from_numpy(mel_tokens(made.wave)).float()
        layout, level = Layout.sound(len(x), 0.04), SoundLevel().read(Pixels(x))[None]
        (method,) = baseline_plan("drop-low-energy", "30%").methods
        kept = set(method.reduce(View.of(x[None], level, layout=layout)).index[0].tolist())
        heard = {t for e in made.events for t in range(round(e.span[0] / 0.04), round(e.span[1] / 0.04))}
        assert len(kept & heard) >= 0.95 * len(kept)


def test_baselines_that_do_not_choose_are_plans_of_the_contract():
    assert isinstance(baseline_plan("uniform", 8).methods[0], Uniform)
    with pytest.raises(WinnowError, match="Unknown baseline 'best'"):
        baseline_plan("best", 8)
