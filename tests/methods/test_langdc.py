"""LangDC by its card: descriptions that stop by themselves say how many tokens a chunk has."""

from __future__ import annotations

import pytest
import torch

from winnow.core.layout import Layout
from winnow.core.step import State
from winnow.core.view import View
from winnow.methods.langdc import LangDC
from winnow.parts.captioner import START, STOP, Captioner
from winnow.parts.learned import untrained

from .stubs import tokens

WIDTH, WORDS = 16, 9


def made(seed=0):
    return untrained(lambda: Captioner(WIDTH, WORDS, 24, 2, 4), seed)


def telling(*scripts, seed=0):
    """A captioner that says these words of the chunks of an item, whatever they show."""
    module, step = made(seed), [0]

    def logits(states):
        out = torch.full((len(states), WORDS), -1e9)
        for row, script in zip(out, scripts, strict=True):
            row[script[step[0] % len(script)] if step[0] < len(script) else STOP] = 0
        step[0] += 1
        return out

    module.logits = logits
    return module


def view_of(frames, module, b=1, seed=0):
    view = View.of(tokens(seed, frames * 9, WIDTH, b), layout=Layout.grid(3, 3, frames))
    object.__setattr__(view, "module", module)
    return view


def emitted(view, **settings):
    return LangDC(**settings).emit(view, State())[0]


def _as_long_as_what_is_said(count):
    for scripts in (([2, 3], [4, 5, 6, 7], [8]), ([2], [STOP], [3, 3, 3, 3, 3])):
        said = sum(len([w for w in script if w != STOP]) for script in scripts)
        assert count(scripts) == said


@pytest.mark.system("langdc", "exact")
@torch.no_grad()
def test_there_are_as_many_tokens_as_words_before_the_stop():
    _as_long_as_what_is_said(lambda scripts: emitted(view_of(5, telling(*scripts)), pooled=False).tokens.shape[1])


@torch.no_grad()
def test_that_fails_where_the_stop_is_not_heeded():
    def deaf(scripts):
        return emitted(view_of(5, telling(*(script + [2] * 9 for script in scripts))), pooled=False).tokens.shape[1]

    with pytest.raises(AssertionError):
        _as_long_as_what_is_said(deaf)


@pytest.mark.system("langdc", "exact")
@torch.no_grad()
def test_what_is_said_behind_the_first_stop_is_not_there():
    module = telling([2, STOP, 3, 4], [5, 6, STOP, 7])
    assert emitted(view_of(4, module), pooled=False).tokens.shape[1] == 3


@pytest.mark.system("langdc", "exact")
@torch.no_grad()
def test_the_cap_holds_and_nothing_said_is_nothing():
    long = [2, 3, 4, 5, 6, 7, 8]
    for most in (0, 1, 3):
        assert emitted(view_of(4, telling(long, long)), most=most, pooled=False).tokens.shape[1] == 2 * most
    module = telling([STOP], [STOP])
    nothing = emitted(view_of(4, module), pooled=False)
    assert nothing.tokens.shape == (1, 0, WIDTH)
    assert emitted(view_of(4, telling([STOP], [STOP]))).tokens.shape == (1, 4, WIDTH)


@pytest.mark.system("langdc", "exact")
@torch.no_grad()
def test_beside_what_is_said_stands_the_mean_of_each_frame():
    view = view_of(5, telling([2], [3, 4], [STOP]))
    emit = emitted(view)
    came = emit.provenance
    at = came.representatives[0]
    assert at.tolist() == sorted(at.tolist())
    for frame in range(5):
        j = at.tolist().index(9 * frame + 4)
        torch.testing.assert_close(emit.tokens[0, j], view.tokens[0, 9 * frame : 9 * frame + 9].mean(0))
        assert came.lane(0).sources(j).tolist() == list(range(9 * frame, 9 * frame + 9))
    assert came.is_stochastic
    assert emit.tokens.shape[1] == 5 + 3


@pytest.mark.system("langdc", "exact")
@torch.no_grad()
def test_a_token_is_the_projected_state_of_its_word_on_what_it_was_chosen_by_or_the_word_alone():
    scripts = [2, 3, 4], [5]
    for states in ("contextual", "word"):
        module = telling(*scripts)
        view = view_of(4, module)
        emit = emitted(view, pooled=False, states=states)
        place = torch.cartesian_prod(torch.arange(2), torch.arange(3), torch.arange(3))[None]
        want = []
        for c, script in enumerate(scripts):
            part, there = view.tokens[:, 18 * c : 18 * c + 18], torch.ones(1, 18, dtype=torch.bool)
            for n in range(1, len(script) + 1):  # what stands behind a word changes nothing
                state, weights = module.states(part, place, there, torch.tensor([[START, *script[:n]]]))
                if states == "contextual":  # on top of what was attended to when the word was chosen
                    want.append(module.soft(state[0, -1]) + weights[0, -2] @ part[0])
                else:
                    want.append(module.soft(module.words.weight[script[n - 1]]))
        torch.testing.assert_close(emit.tokens[0], torch.stack(want))


@pytest.mark.system("langdc", "exact")
@torch.no_grad()
def test_words_alone_know_nothing_of_what_is_seen():
    def both(states):
        return [emitted(view_of(4, telling([2], [3]), seed=s), pooled=False, states=states).tokens for s in (0, 1)]

    a, b = both("word")
    assert torch.equal(a, b)
    a, b = both("contextual")
    assert (a - b).abs().max() > 1e-3


@pytest.mark.system("langdc", "exact")
@torch.no_grad()
def test_a_batch_is_ragged_and_its_items_are_as_they_are_alone():
    module = made(3)
    module.words.weight[STOP] += 0.4  # so that descriptions end at different words
    view = view_of(6, module, b=5, seed=2)
    whole = emitted(view, pooled=False)
    counts = whole.provenance.counts
    assert counts is not None
    assert min(counts) < max(counts)
    for lane in range(5):
        alone = View.of(view.tokens[lane : lane + 1], layout=view.layout)
        object.__setattr__(alone, "module", module)
        emit = emitted(alone, pooled=False)
        assert emit.tokens.shape[1] == counts[lane]
        torch.testing.assert_close(whole.tokens[lane, : counts[lane]], emit.tokens[0])
        own = whole.provenance.lane(lane)
        assert torch.equal(own.representatives, emit.provenance.representatives[0])


@torch.no_grad()
def test_broken_tokens_are_counted_and_not_read():
    spoilt = []
    for broken in (torch.nan, torch.inf):
        view = view_of(4, telling([2, 3], [4]))
        view.tokens[0, 5] = broken
        spoilt.append(emitted(view))
        assert int(view.notes["nan_scores"]) == 1
        assert (spoilt[-1].provenance.matrix[0, :, 5] == 0).all()
    assert torch.equal(spoilt[0].tokens, spoilt[1].tokens)
    view = view_of(4, telling([2, 3], [4]))
    view.tokens[0, 18:] = torch.nan  # a whole chunk
    assert emitted(view).tokens.isfinite().all()
