"""The point `frames`: a step says which frames enter, and the ledger says which did. V4, V5 and V6 of the list."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import pytest
import torch
import zoo
from cases import same
from probes import HALF, MIDDLE, Pick, forward, generate
from video_processor import VideoProcessor

import winnow
from winnow.contract import Budget, FramesView, Method, Reduction, VisionAttention, top_k
from winnow.core.errors import UnsupportedError, WinnowError
from winnow.core.plan import Plan
from winnow.core.step import Observe, State
from winnow.models.inputs import model_inputs
from winnow.video import Video

BUILD = "qwen2_5_vl"
QUESTION = "what is this ?"


@dataclass(frozen=True)
class Novel(Method):
    """Keeps the frames that differ most from the one before; the first counts as new."""

    keep: Budget = HALF
    at: ClassVar[str] = "frames"
    slug: ClassVar[str] = "novel"

    def score(self, view: FramesView):
        pixels = view.pixels.float().flatten(2)
        change = (pixels[:, 1:] - pixels[:, :-1]).abs().mean(-1)
        return torch.cat([torch.full((view.b, 1), 1e9), change], 1)


@dataclass(frozen=True)
class Handed(Method):
    """Keeps the frames whose features are largest, and every second of those that are left."""

    at: ClassVar[str] = "frames"
    slug: ClassVar[str] = "handed"
    identity = None

    def reduce(self, view: FramesView) -> Reduction:
        return top_k(view.features.sum(-1), 4)


def video(n: int = 12, *, cuts: tuple[int, ...] = (), still: bool = False) -> Video:
    """Frames of noise that changes at cuts alone, or at every frame."""
    random = np.random.default_rng(0)
    made, now = [], None
    for i in range(n):
        if now is None or (not still and (not cuts or i in cuts)):
            now = random.integers(0, 256, (42, 56, 3), dtype=np.uint8)
        made.append(now)
    return Video.of(np.stack(made), fps=4)


def test_a_step_chooses_frames_and_the_ledger_says_which():
    model, processor = zoo.model(BUILD), VideoProcessor(QUESTION)
    with winnow.compress(model, Plan((Novel(Budget(4)), Pick(Budget(5)))), processor=processor) as handle:
        chosen = handle.frames(video(12, cuts=(3, 7, 10)))
        assert chosen.sampled.numbers == (0, 3, 7, 10)
        assert chosen.times == (0.0, 0.75, 1.75, 2.5)
        with handle.using(handle.plan, videos=[chosen]):
            generate(model, model_inputs(model, processor, chosen, QUESTION))
        (item,) = handle.last.items
    assert item.frames.numbers == (0, 3, 7, 10)
    assert [(at, slug, r.n, r.m) for at, slug, r in item.frames.reductions] == [("frames", "novel", 12, 4)]
    assert item.layout.n_content == 2 * 12  # two frames make a row of 3 × 4 tokens
    assert len(item.kept) == 5
    assert "novel kept 4 of 12" in str(item.frames)


def test_chosen_frames_give_what_these_frames_give_alone():
    model, processor = zoo.model(BUILD), VideoProcessor(QUESTION)
    whole = video(12, cuts=(3, 7, 10))
    by_hand = Video.of(whole.frames[[0, 3, 7, 10]], times=[0.0, 0.75, 1.75, 2.5])
    plain = generate(model, model_inputs(model, processor, by_hand, QUESTION))
    with winnow.compress(model, Novel(Budget(4)), processor=processor) as handle:
        chosen = handle.frames(whole)
        with handle.using(handle.plan, videos=[chosen]):
            assert same(generate(model, model_inputs(model, processor, chosen, QUESTION)), plain)
    assert processor.told[0]["frames_indices"] == processor.told[1]["frames_indices"]


def test_times_reach_the_model_through_the_processor():
    model, processor = zoo.model(BUILD), VideoProcessor(QUESTION)
    for fps in (1, 4, 30):
        made = model_inputs(model, processor, Video.of(video(6).frames, fps=fps), QUESTION)
        assert made["second_per_grid_ts"] == pytest.approx([2 / fps], rel=0.01)
        assert "video_metadata" not in made


def test_V1_one_frame_and_odd_numbers_reach_the_model():
    model, processor = zoo.model(BUILD), VideoProcessor(QUESTION)
    for n in (1, 2, 3, 5):
        inputs = model_inputs(model, processor, video(n), QUESTION)
        with winnow.compress(model, Pick(Budget(3)), processor=processor) as handle:
            with handle.using(handle.plan, videos=[video(n)]):
                generate(model, inputs)
            (item,) = handle.last.items
            assert item.layout.n_content == 12 * -(-n // 2)
            assert len(item.kept) == 3


def test_V4_of_a_still_video_the_floor_stays():
    with winnow.compress(zoo.model(BUILD), Novel(Budget("10%"))) as handle:
        assert handle.frames(video(12, still=True)).sampled.numbers == (0,)
        assert handle.frames(video(1)).sampled.numbers == (0,)
    with winnow.compress(zoo.model(BUILD), Novel(Budget(5))) as handle:
        assert handle.frames(video(12, still=True)).sampled.numbers == (0, 1, 2, 3, 4)  # ties go to the first


def test_V5_with_a_cut_at_each_frame_the_budget_is_kept_exactly():
    for keep in (1, 5, 12):
        with winnow.compress(zoo.model(BUILD), Novel(Budget(keep))) as handle:
            assert len(handle.frames(video(12))) == keep


ROWS = ("3 V 2 A 6", "2 B 4 V 3 C 5", "4 A 2", "7")


def test_V6_videos_among_pictures_are_told_by_their_place():
    model, inputs = zoo.model(BUILD), zoo.inputs(BUILD, ROWS)
    shown = [Video.of(video(n).frames, fps=4) for n in (3, 4)]
    with winnow.compress(model, Pick(Budget(5))) as handle:
        with handle.using(handle.plan, videos=shown):
            forward(model, inputs)
        items = handle.last.items
    assert [(i.row, i.modality, None if i.frames is None else i.frames.kept) for i in items] == [
        (0, "video", 3),
        (0, "image", None),
        (1, "image", None),
        (1, "video", 4),
        (1, "image", None),
        (2, "image", None),
    ]


def test_V6_beams_repeat_the_videos_of_their_rows():
    model, inputs = zoo.model(BUILD), zoo.inputs(BUILD, ("3 V 6", "2 V 4"))
    shown = [video(3), video(4)]
    with winnow.compress(model, Pick(Budget(5))) as handle, handle.using(handle.plan, videos=shown):
        with torch.no_grad():
            model.generate(**inputs, num_beams=3, max_new_tokens=2, do_sample=False)
        kept = {item.row: item.frames.kept for item in handle.last.items}
    assert set(kept.values()) == {3, 4}
    assert list(kept.values()) == sorted(kept.values())


def test_features_that_are_handed_over_follow_the_frames():
    features = torch.arange(12.0)[:, None].flip(0)
    with winnow.compress(zoo.model(BUILD), Plan((Novel(Budget(6)), Handed()))) as handle:
        chosen = handle.frames(video(12, cuts=(2, 4, 6, 8, 10)), features=features)
    assert chosen.sampled.numbers == (0, 2, 4, 6)
    assert [(slug, r.n, r.m) for _, slug, r in chosen.sampled.reductions] == [("novel", 12, 6), ("handed", 6, 4)]


def test_a_plan_that_chooses_frames_is_not_left_out_in_silence():
    model, inputs = zoo.model(BUILD), zoo.inputs(BUILD, ("3 V 6",))
    with winnow.compress(model, Novel(Budget(2))) as handle:
        with pytest.raises(WinnowError, match=r"handle\.frames\(video\)"):
            forward(model, inputs)
        with handle.using(handle.plan, videos=[video(4)]), pytest.raises(WinnowError, match="were not chosen by"):
            forward(model, inputs)
        forward(model, zoo.inputs(BUILD, ("3 A 6",)))  # a picture has no frames
        with handle.using("full"):
            forward(model, inputs)


@pytest.mark.parametrize("count", [0, 2, 3])
def test_other_videos_than_those_of_the_request_are_refused(count):
    model, inputs = zoo.model(BUILD), zoo.inputs(BUILD, ("3 V 6",))
    with winnow.compress(model, Pick()) as handle:
        says = f"names {count} videos, and the request holds 1"
        with handle.using(handle.plan, videos=[video(4)] * count), pytest.raises(WinnowError, match=says):
            forward(model, inputs)
        says = "2 frames of a video that has 1"
        with handle.using(handle.plan, videos=[video(1)]), pytest.raises(WinnowError, match=says):
            forward(model, inputs)


@dataclass(frozen=True)
class Wrong(Method):
    """What is asked for at frames and cannot be had there."""

    what: str = "merge"
    at: ClassVar[str] = "frames"
    slug: ClassVar[str] = "wrong"
    identity = None

    def _one_step(self, view: FramesView, state: State):
        n = view.n
        return {
            "merge": lambda: Reduction.assign(torch.zeros(1, n, dtype=torch.int64), m=1),
            "reorder": lambda: Reduction.select(torch.tensor([[1, 0]]), n, ordered=False),
            "descend": lambda: Reduction.select(torch.tensor([[1, 0]]), n),
            "nothing": lambda: Reduction.select(torch.zeros(1, 0, dtype=torch.int64), n),
            "other": lambda: Reduction.select(torch.tensor([[0]]), n + 1),
            "signal": lambda: view[VisionAttention()],
            "observe": lambda: Observe(),
        }[self.what]()


@pytest.mark.parametrize("what", ["merge", "reorder", "descend", "nothing", "other", "signal"])
def test_what_a_step_at_frames_cannot_ask_for(what):
    with winnow.compress(zoo.model(BUILD), Wrong(what)) as handle, pytest.raises(WinnowError, match="frames"):
        handle.frames(video(4))


def test_a_step_that_only_looks_changes_nothing():
    with winnow.compress(zoo.model(BUILD), Wrong("observe")) as handle:
        assert handle.frames(video(4)).sampled.numbers == (0, 1, 2, 3)


@dataclass(frozen=True)
class Looking(Method):
    """Wants attention before any model has run."""

    signal: VisionAttention = MIDDLE
    at: ClassVar[str] = "frames"
    slug: ClassVar[str] = "looking"


def test_refusals_name_what_can_be_done():
    model = zoo.model(BUILD)
    with pytest.raises(WinnowError, match="before any model runs"):
        winnow.compress(model, Looking())
    with pytest.raises(UnsupportedError, match="does not offer"):
        winnow.compress(zoo.model("llava_clip"), Novel())
    with pytest.raises(UnsupportedError, match="chooses frames"):
        winnow.prepare(model, zoo.inputs(BUILD, ("3 V 6",)), Novel())
    with winnow.compress(model, Novel(Budget(2))) as handle:
        with pytest.raises(WinnowError, match="open_video"):
            handle.frames("clip.mp4")
        with pytest.raises(WinnowError, match="chosen already"):
            handle.frames(handle.frames(video(4)))
        with pytest.raises(WinnowError, match="one row for each of 4"):
            handle.frames(video(4), features=torch.zeros(3, 2))
    with pytest.raises(UnsupportedError, match="not known to take videos"):
        model_inputs(zoo.model("llava_clip"), VideoProcessor(QUESTION), video(2), QUESTION)
