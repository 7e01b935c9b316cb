"""B-VLLM by its card: a cap for any video, rows that choose one frame are one, and the question counts."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from winnow.core.errors import WinnowError
from winnow.core.info import ModelInfo
from winnow.core.layout import Layout
from winnow.core.step import Emit
from winnow.core.view import View
from winnow.methods.b_vllm import BVLLM
from winnow.parts.balanced import Balanced
from winnow.parts.learned import untrained
from winnow.signals.question import QuestionTokens

from . import connectors
from .stubs import tokens

H, W, D = 2, 3, 16
P = H * W
QUESTION = QuestionTokens()


class Choice(nn.Module):
    """A chooser whose rows are given."""

    def __init__(self, rows):
        super().__init__()
        self.rows = nn.Parameter(rows, requires_grad=False)

    def forward(self, means, text):
        return self.rows.expand(len(means), -1, -1)


class Places(nn.Module):
    """A reader whose queries find the first tokens of a frame as they are."""

    def __init__(self, queries):
        super().__init__()
        self.eye = nn.Parameter(torch.eye(P)[:queries], requires_grad=False)

    def forward(self, frames, text, place):
        return self.eye @ frames, self.eye.expand(len(frames), -1, -1)


def module(frames=4, queries=3, seed=0):
    return untrained(lambda: Balanced(D, frames, queries, 8, 2, 2), seed)


def plain(rows, queries=3):
    """A module that chooses by these rows and passes tokens on."""
    made = module(len(rows), queries)
    made.chooser, made.reader, made.out = Choice(rows), Places(queries), nn.Sequential(nn.Linear(D, D))
    made.out[0].weight.data, made.out[0].bias.data = torch.eye(D), torch.zeros(D)
    return made


def view_of(t, b=1, seed=0, made=None, words=5):
    view = View.of(tokens(seed, t * P, D, b), {QUESTION: tokens(seed + 1, words, D, b)}, layout=Layout.grid(H, W, t))
    return replace(view, module=module() if made is None else made)


def read(view, **settings) -> Emit:
    return BVLLM(**settings).read(view)


def takes_whole_frames(rows, found):
    """All frames that rows choose, in order, their first three tokens each."""
    chosen = sorted({int(row.argmax()) for row in rows})
    assert found.tokens.shape[1] == 3 * len(chosen)
    return chosen


@pytest.mark.system("b-vllm", "exact")
@pytest.mark.parametrize("t", [1, 2, 5])
def test_one_row_for_each_frame_leaves_all_frames_as_they_are(t):
    view = view_of(t, made=plain(torch.eye(t)))
    found = read(view, threshold=1.0, cap=3 * t)
    x = view.tokens[0].unflatten(0, (t, P))
    assert torch.equal(found.tokens[0], x[:, :3].flatten(0, 1))
    assert found.provenance.representatives[0].tolist() == [f * P + c for f in range(t) for c in (0, 2, 5)]
    torch.testing.assert_close(found.provenance.apply(view.tokens), found.tokens)


def holds_the_cap(view, found, cap, k):
    """No more tokens than the cap, or one of each frame; and as many of each frame."""
    m = found.tokens.shape[1]
    assert m <= max(cap, k)
    assert m % k == 0
    assert m // k == max(1, min(cap // k, 3, P))
    assert len(set(found.provenance.representatives[0].tolist())) == m


@pytest.mark.system("b-vllm", "exact")
@given(st.integers(1, 128), st.integers(1, 40), st.integers(0, 99))
def test_the_cap_holds_for_any_number_of_frames(t, cap, seed):
    count = min(t, 16)
    rows = torch.eye(t)[torch.randint(t, (count,), generator=torch.Generator().manual_seed(seed))]
    view = view_of(t, made=plain(rows))
    found = read(view, cap=cap)
    holds_the_cap(view, found, cap, len({int(row.argmax()) for row in rows}))
    assert found.tokens.isfinite().all()


def test_a_cap_that_is_not_held_is_told():
    view = view_of(8, made=plain(torch.eye(8)))
    with pytest.raises(AssertionError):
        holds_the_cap(view, read(view, cap=24), 9, 8)


def joins_the_same_and_no_others(choose):
    for seed in range(20):
        at = torch.randint(6, (5,), generator=torch.Generator().manual_seed(seed)).tolist()
        assert choose(torch.eye(6)[at]) == sorted(set(at))


@pytest.mark.system("b-vllm", "exact")
def test_rows_that_choose_one_frame_are_one_and_others_never():
    def choose(rows, **settings):
        found = read(view_of(6, made=plain(rows)), **settings)
        return found.provenance.representatives[0, ::3].div(P, rounding_mode="floor").tolist()

    joins_the_same_and_no_others(choose)
    for stub in (lambda rows: choose(rows, threshold=1.0), lambda rows: choose(rows, threshold=0.4)):
        with pytest.raises(AssertionError):
            joins_the_same_and_no_others(stub)


@pytest.mark.system("b-vllm", "exact")
def test_as_released_rows_stand_as_they_came_and_chains_are_lost():
    angle = torch.tensor([1.57, 0.8, 0.0])
    rows = torch.stack([angle.cos(), angle.sin()], 1)
    view = view_of(2, made=plain(rows / rows.sum(1, keepdim=True)))
    lost = BVLLM.as_released().read(view)
    joined = read(view)
    assert lost.tokens.shape == joined.tokens.shape == (1, 3, D)
    share = lambda found: found.provenance.to_matrix()[0, 0].unflatten(0, (2, P)).sum(1)  # noqa: E731
    norm = (rows / rows.sum(1, keepdim=True)).tolist()
    torch.testing.assert_close(share(lost), torch.tensor(norm[:2]).mean(0))
    torch.testing.assert_close(share(joined), torch.tensor(norm).mean(0))
    late = view_of(3, made=plain(torch.eye(3)[[2, 0]]))
    x = late.tokens[0].unflatten(0, (3, P))
    released = BVLLM.as_released().read(late)
    assert not released.provenance.ordered
    assert torch.equal(released.tokens[0], x[[2, 0], :3].flatten(0, 1))
    assert torch.equal(read(late).tokens[0], x[[0, 2], :3].flatten(0, 1))


@pytest.mark.system("b-vllm", "exact")
def test_shares_of_frames_add_up_to_one_and_depend_on_the_question():
    made, view = module(), view_of(7)
    means = view.tokens.unflatten(1, (7, P)).mean(2)
    shares = made.chooser(means, view[QUESTION])
    assert shares.shape == (1, 4, 7)
    torch.testing.assert_close(shares.sum(2), torch.ones(1, 4))
    assert (made.chooser(means, -view[QUESTION]) - shares).abs().max() > 1e-4
    assert not torch.equal(read(view).tokens, read(replace(view, signals={QUESTION: -view[QUESTION]})).tokens)
    assert made.chooser(means[:, :2], view[QUESTION]).shape == (1, 2, 2)
    noisy = made.chooser.draws = torch.Generator().manual_seed(0)
    assert noisy is not None
    assert not torch.equal(made.chooser(means, view[QUESTION]), shares)


def test_a_batch_is_its_items_which_may_have_unequal_numbers_of_tokens():
    rows = torch.stack([torch.eye(4)[[0, 1, 2]], torch.eye(4)[[1, 1, 1]]])
    made = plain(torch.eye(4)[:3])

    class Each(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.calls = nn.Parameter(torch.zeros(1)), 0

        def forward(self, means, text):
            self.calls += 1
            return rows[self.calls - 1][None]

    made.chooser = Each()
    found = read(view_of(4, b=2, made=made))
    assert found.provenance.counts == (9, 3)
    assert found.tokens.shape == (2, 9, D)
    view = view_of(5, b=3)
    whole = read(view)
    for i in range(3):
        alone = replace(
            view, tokens=view.tokens[i : i + 1], signals={QUESTION: view[QUESTION][i : i + 1]}, ids=view.ids[:1]
        )
        assert torch.equal(read(alone).tokens[0], whole.tokens[i, : read(alone).tokens.shape[1]])


def test_half_precision_is_computed_in_full_and_broken_tokens_reach_nothing():
    view = view_of(5)
    half = replace(view, tokens=view.tokens.bfloat16(), signals={QUESTION: view[QUESTION].bfloat16()})
    wide = replace(half, tokens=half.tokens.float(), signals={QUESTION: half[QUESTION].float()})
    assert torch.equal(read(half).tokens, read(wide).tokens.bfloat16())
    view.tokens[0, [2, 11]] = torch.nan
    assert read(view).tokens.isfinite().all()
    assert int(view.notes["nan_scores"]) == 2


def test_pictures_are_one_frame_and_what_lacks_tokens_is_refused():
    view = view_of(1)
    assert read(view).tokens.shape == (1, 3, D)
    left = torch.arange(10)[None]
    gone = View(tokens(0, 10, D), Layout.grid(H, W, 4), left, 24, {QUESTION: tokens(1, 5, D)}, module=module())
    with pytest.raises(WinnowError, match="before methods that remove"):
        read(gone)


def test_settings_are_checked_and_sizes_are_those_of_the_settings():
    for bad in ({"cap": 0}, {"frames": 0}, {"queries": 0}, {"threshold": 1.5}, {"chains": "keep"}, {"order": "none"}):
        with pytest.raises(WinnowError):
            BVLLM(**bad)
    made = BVLLM(frames=5, queries=2).build(ModelInfo(width=D))
    assert made.chooser.rows.queries.shape[0] == 5
    assert made.reader.queries.shape[0] == 2
    with pytest.raises(WinnowError, match="trained for another model"):
        BVLLM().build(ModelInfo(width=D, fingerprint=lambda: "another"))


@pytest.mark.system("b-vllm", "directional")
@pytest.mark.xdist_group("clips")
def test_trained_it_answers_more_about_clips_than_untrained():
    found = connectors.of_method("b-vllm")
    assert 4 <= found.tokens <= 18
    assert found.over_untrained.low > 0
