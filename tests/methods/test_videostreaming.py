"""VideoStreaming by its card: as many tokens for any video, memory of what came before, and the best clips."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from winnow.core.errors import WinnowError
from winnow.core.info import ModelInfo
from winnow.core.layout import Layout
from winnow.core.step import Emit
from winnow.core.view import View
from winnow.learn.connectors import compared
from winnow.learn.connectors.clips import rows_of
from winnow.methods.videostreaming import VideoStreaming
from winnow.parts.frame_parts import share_of_parts
from winnow.parts.learned import untrained
from winnow.parts.recurrent_memory import RecurrentMemory
from winnow.signals.question import QuestionTokens

from . import connectors
from .stubs import tokens

H, W, D, E = 2, 3, 16, 32
P = H * W
QUESTION = QuestionTokens()
SHARE = torch.eye(3).repeat_interleave(2, 1) / 2


def module(each=2, seed=0):
    return untrained(lambda: RecurrentMemory(D, E, 2, 2, each), seed)


def view_of(t, b=1, seed=0, words=4, each=2):
    view = View.of(tokens(seed, t * P, D, b), {QUESTION: tokens(seed + 1, words, D, b)}, layout=Layout.grid(H, W, t))
    return replace(view, module=module(each))


def recalled(view, **settings) -> Emit:
    return VideoStreaming(**{"clip": 2, "per_frame": 3, "chosen": 2, **settings}).recall(view)


def memories(x, made=None):
    """`[k, s, e]` of one video."""
    place = torch.stack(torch.meshgrid(torch.arange(H), torch.arange(W), indexing="ij"), -1).flatten(0, 1)
    return (made or module()).memories(x, SHARE, place[None].float())[0][0]


def as_long_for_any_video(length):
    for clips in (1, 2, 3, 7, 30, 100):
        assert length(2 * clips) == 6 * min(2, clips)


@pytest.mark.system("videostreaming", "exact")
def test_there_are_as_many_tokens_for_any_number_of_clips():
    as_long_for_any_video(lambda t: recalled(view_of(t)).tokens.shape[1])
    as_long_for_any_video(lambda t: recalled(view_of(t), last=True).provenance.m)


@pytest.mark.parametrize("stub", [lambda t: 3 * t, lambda t: 12])
def test_another_length_is_told(stub):
    with pytest.raises(AssertionError):
        as_long_for_any_video(stub)


def knows_only_what_came_before(remember):
    """Memory up to a clip stays as it was when later clips change, and changes when earlier ones do."""
    x = tokens(0, 10 * P, D).unflatten(1, (10, P))
    plain = remember(x)
    for k in range(5):
        later, earlier = x.clone(), x.clone()
        later[:, 2 * k + 2 :] += 1
        assert torch.equal(remember(later)[: k + 1], plain[: k + 1])
        earlier[:, 2 * k] = -earlier[:, 2 * k]
        assert ((remember(earlier) - plain)[k:].abs().amax((1, 2)) > 1e-6).all()


@pytest.mark.system("videostreaming", "exact")
def test_memory_knows_only_what_came_before_and_all_of_it():
    knows_only_what_came_before(memories)


def alone(x):
    """Clips without the memory of the clip before."""
    return torch.cat([memories(x[:, i : i + 2]) for i in range(0, 10, 2)])


def backwards(x):
    return memories(x.flip(1)).flip(0)


@pytest.mark.parametrize("stub", [alone, backwards])
def test_other_memories_are_told(stub):
    with pytest.raises(AssertionError):
        knows_only_what_came_before(stub)


@pytest.mark.system("videostreaming", "exact")
def test_the_language_model_is_given_the_memory_of_the_clips_that_fit_best():
    for seed in range(6):
        view = view_of(10, seed=seed)
        place = torch.stack(torch.meshgrid(torch.arange(H), torch.arange(W), indexing="ij"), -1).flatten(0, 1).float()
        x = view.tokens.unflatten(1, (10, P))
        share = share_of_parts(view.layout, P, 3, x.device)
        kept, scores, _ = view.module(x, view[QUESTION], share, place[None])
        best = sorted(sorted(range(5), key=lambda k: -scores[0, k])[:2])
        found = recalled(view)
        assert torch.equal(found.tokens[0], kept[0, best].flatten(0, 1))
        frames = found.provenance.representatives[0].div(P, rounding_mode="floor").tolist()
        assert frames == [f for k in best for f in (2 * k,) * 3 + (2 * k + 1,) * 3]
        last = recalled(view, last=True)
        assert torch.equal(last.tokens[0, 6:], kept[0, 4])
        others = recalled(view, chosen=1)
        assert torch.equal(others.tokens[0], kept[0, int(scores[0].argmax())])


@pytest.mark.system("videostreaming", "exact")
def test_each_token_comes_from_its_clip_and_no_place_is_taken_twice():
    for t in (2, 5, 7, 10):
        found = recalled(view_of(t)).provenance
        at = found.representatives[0].tolist()
        assert at == sorted(set(at))
        matrix = found.to_matrix()[0]
        torch.testing.assert_close(matrix.sum(1), torch.ones(found.m))
        for row, place in zip(matrix, at, strict=True):
            frames = (row.nonzero()[:, 0] // P).unique().tolist()
            assert place // P in frames
            assert len(frames) <= 2


def test_clips_of_unequal_length_have_as_many_tokens():
    assert recalled(view_of(5, each=3), clip=3).tokens.shape[1] == 12  # 2 and 3 frames: two groups of each
    assert recalled(view_of(3), clip=2).tokens.shape[1] == 6
    assert recalled(view_of(1), clip=2).tokens.shape[1] == 3
    assert recalled(view_of(4), per_frame=99).tokens.shape[1] == 4 * P


def test_the_question_decides_and_a_batch_is_its_items():
    view = view_of(12, b=3)
    whole = recalled(view)
    chosen = set()
    for i in range(3):
        own = replace(
            view, tokens=view.tokens[i : i + 1], signals={QUESTION: view[QUESTION][i : i + 1]}, ids=view.ids[:1]
        )
        assert torch.equal(recalled(own).tokens[0], whole.tokens[i])
        for seed in range(8):
            asked = replace(own, signals={QUESTION: 3 * tokens(seed, 4, D)})
            chosen.add((i, *recalled(asked).provenance.representatives[0].tolist()))
    assert len(chosen) > 3


def test_half_precision_is_computed_in_full_and_broken_tokens_reach_nothing():
    view = view_of(6)
    half = replace(view, tokens=view.tokens.bfloat16(), signals={QUESTION: view[QUESTION].bfloat16()})
    wide = replace(half, tokens=half.tokens.float(), signals={QUESTION: half[QUESTION].float()})
    assert torch.equal(recalled(half).tokens, recalled(wide).tokens.bfloat16())
    view.tokens[0, [2, 11]] = torch.nan
    assert recalled(view).tokens.isfinite().all()
    assert int(view.notes["nan_scores"]) == 2


def test_gradients_flow_back_through_no_more_than_four_clips():
    made, x = module(), tokens(0, 16 * P, D).unflatten(1, (16, P)).requires_grad_()
    memories(x, made)[7].sum().backward()
    reached = x.grad.abs().amax((0, 2, 3)) > 0
    assert reached.tolist() == [False] * 8 + [True] * 8


def test_what_lacks_tokens_is_refused_and_settings_are_checked():
    gone = View(tokens(0, 10, D), Layout.grid(H, W, 4), torch.arange(10)[None], 24, {QUESTION: tokens(1, 5, D)})
    with pytest.raises(WinnowError, match="before methods that remove"):
        recalled(replace(gone, module=module()))
    for bad in ({"clip": 0}, {"per_frame": 0}, {"chosen": 0}):
        with pytest.raises(WinnowError):
            VideoStreaming(**bad)
    assert VideoStreaming(clip=3).build(ModelInfo(width=D)).each == 3
    with pytest.raises(WinnowError, match="trained for another model"):
        VideoStreaming().build(ModelInfo(width=D, fingerprint=lambda: "another"))


@pytest.mark.system("videostreaming", "directional")
@pytest.mark.xdist_group("clips")
def test_trained_it_answers_more_about_clips_than_untrained():
    found = connectors.of_method("videostreaming")
    assert found.tokens == 16
    assert found.over_untrained.low > 0


def recall(**settings):
    """The share of the seconds of the evidence that are among the four that are chosen."""
    method = VideoStreaming(clip=1, chosen=4, **settings)
    frozen, shares = connectors.frozen(), []
    rows = rows_of(compared.test_records(frozen, 12), asks=True)
    (step,) = method.bind(frozen.info)[1]
    for numbers, view in frozen.views(rows, step, method.build(frozen.info).eval()):
        chosen = method.recall(view).provenance.representatives // 9
        for number, own in zip(numbers, chosen.tolist(), strict=True):
            evidence = {*rows[number].asked[0].seconds}
            if 0 < len(evidence) <= 4:
                shares.append(len(evidence & {*own}) / len(evidence))
    assert len(shares) > 40
    return sum(shares) / len(shares)


@pytest.mark.system("videostreaming", "directional")
@pytest.mark.xdist_group("clips")
def test_trained_the_clips_of_the_evidence_are_chosen():
    """Half of the clips are, so that a blind choice has half of the evidence."""
    assert recall() > 0.8
    assert recall(weights="untrained") < 0.7
