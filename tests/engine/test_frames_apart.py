"""Families that are given each frame of a video as a picture: one item where the video is named, a word where not."""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from typing import ClassVar

import builds
import numpy as np
import pytest
import torch
from cases import same
from probes import Look, Pick, forward, generate

import winnow
from winnow.contract import Budget, FramesView, Method, Reduction, View
from winnow.core.errors import WinnowError, WinnowWarning
from winnow.core.layout import Layout
from winnow.methods.evs import EVS
from winnow.video import Video

FRAMES = {"internvl": (3, 3, 3), "smolvlm": (3, 3, 3), "minicpmv4_6": (2, 2, 3)}  # frames, rows and columns of tokens
KEPT = 4


def video(frames: int) -> Video:
    return Video.of(np.zeros((frames, 8, 8, 3), dtype=np.uint8), fps=1)


def tokens_of(build: str, sample) -> torch.Tensor:
    """`[t, p, D]` the tokens of the frames, each as a picture by itself."""
    model, look = builds.every()[build].model(), Look()
    with winnow.compress(model, look):
        forward(model, sample)
    return torch.cat([view.tokens for view in look.views])


@dataclass(frozen=True)
class Given(Method):
    """Keeps of each picture the tokens that it is told."""

    kept: tuple[str, ...] = ()
    slug: ClassVar[str] = "given"
    identity = None

    def reduce(self, view: View) -> Reduction:
        mask = torch.tensor([[digit == "1" for digit in row] for row in self.kept])
        return Reduction.select(mask, counts=tuple(mask.sum(1).tolist()))


@pytest.mark.parametrize("build", FRAMES)
def test_a_named_video_is_one_item_whose_frames_are_compared(build):
    frames, h, w = FRAMES[build]
    model, sample = builds.every()[build].model(), builds.every()[build].sample("3 V 6")
    x = tokens_of(build, sample)
    assert x.shape[:2] == (frames, h * w)
    change = (1 - torch.cosine_similarity(x[1:], x[:-1], dim=-1)).flatten()
    mask = torch.ones(frames * h * w)
    mask[h * w :] = (change >= change.sort(descending=True).values[KEPT - 1]).float()
    wanted = mask.nonzero()[:, 0].tolist()
    assert len(wanted) == h * w + KEPT
    with winnow.compress(model, EVS(keep=Budget(h * w + KEPT))) as handle:
        with handle.using(handle.plan, videos=[video(frames)]):
            logits = forward(model, sample).logits
        (item,) = handle.last.items
    assert (item.modality, item.frames.kept, item.layout) == ("video", frames, Layout.grid(h, w, frames))
    assert item.kept.tolist() == wanted
    told = Given(tuple("".join(str(int(i)) for i in row) for row in mask.view(frames, -1)))
    with winnow.compress(model, told):
        assert (forward(model, sample).logits[:, -1] - logits[:, -1]).abs().max() <= 1e-5


@pytest.mark.parametrize("build", FRAMES)
def test_keeping_all_of_a_named_video_changes_nothing(build):
    model, sample = builds.every()[build].model(), builds.every()[build].sample("3 V 6")
    plain = generate(model, sample)
    with winnow.compress(model, "evs:keep=100%") as handle, handle.using(handle.plan, videos=[video(FRAMES[build][0])]):
        assert same(generate(model, sample), plain)


def test_two_videos_of_a_prompt_and_beams():
    model, sample = builds.every()["internvl"].model(), builds.every()["internvl"].sample("3 V 4 V 5")
    with winnow.compress(model, Pick(keep=4)) as handle, handle.using(handle.plan, videos=[video(3), video(3)]):
        generate(model, sample, num_beams=2)
        items = handle.last.items
    assert {item.modality for item in items} == {"video"}
    assert all(item.layout == Layout.grid(3, 3, 3) and len(item.kept) == 4 for item in items)
    assert [item.row for item in items] == [0, 0, 1, 1]


@pytest.mark.parametrize("build", FRAMES)
def test_frames_that_nobody_names_are_told_of(build):
    model, sample = builds.every()[build].model(), builds.every()[build].sample("3 V 6")
    with winnow.compress(model, "evs:keep=50% + divprune:keep=2") as handle:
        with pytest.warns(WinnowWarning, match=r"evs looks across the frames of a video, and .*videos=\[video\]"):
            forward(model, sample)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            with handle.using("divprune:keep=2"):
                forward(model, sample)
            if build != "minicpmv4_6":  # whose frames have a placeholder of their own
                with handle.using(handle.plan, videos=[]):
                    forward(model, sample)
                assert len(handle.last.items) == FRAMES[build][0]


def test_a_single_picture_is_not_told_of():
    model = builds.every()["internvl"].model()
    with warnings.catch_warnings(), winnow.compress(model, "evs:keep=50%"):
        warnings.simplefilter("error")
        forward(model, builds.every()["internvl"].sample("3 A 6"))


def test_prepared_frames_are_told_of():
    model, sample = builds.every()["internvl"].model(), builds.every()["internvl"].sample("3 V 6")
    with pytest.warns(WinnowWarning, match="evs looks across the frames"):
        winnow.prepare(model, sample, "evs:keep=50%")


@pytest.mark.parametrize(
    ("row", "frames", "text"),
    [
        ("3 V 6", [2], "names 1 videos of 2 frames, and the request holds 3"),
        ("3 V 4 B 2", [3], "the request holds 4 pictures"),
        ("3 A 2", [1], r"of \(3,\) tiles"),
    ],
)
def test_what_cannot_be_the_named_videos_is_refused(row, frames, text):
    model, sample = builds.every()["internvl"].model(), builds.every()["internvl"].sample(row)
    with winnow.compress(model, "evs:keep=50%") as handle:
        named = handle.using(handle.plan, videos=[video(n) for n in frames])
        with named, pytest.raises(WinnowError, match=text):
            forward(model, sample)


def test_a_video_over_two_prompts_is_refused():
    build = builds.every()["internvl"]
    model, batch = build.model(), build.batch(("3 B 2", "3 B 2"))
    with winnow.compress(model, "evs:keep=50%") as handle:
        named = handle.using(handle.plan, videos=[video(2)])
        with named, pytest.raises(WinnowError, match="of which 1 stand in prompt 0"):
            forward(model, batch)


@dataclass(frozen=True)
class First(Method):
    """Keeps the first two frames."""

    at: ClassVar[str] = "frames"
    slug: ClassVar[str] = "first"
    identity = None

    def reduce(self, view: FramesView) -> Reduction:
        return Reduction.select(torch.arange(min(2, view.n))[None], view.n)


def test_chosen_frames_must_be_named():
    model, sample = builds.every()["internvl"].model(), builds.every()["internvl"].sample("3 V 6")
    with winnow.compress(model, First()) as handle:
        with pytest.raises(WinnowError, match=r"chooses frames, and .* is given the frames of a video as pictures"):
            forward(model, sample)
        chosen = handle.frames(video(3))
        with handle.using(handle.plan, videos=[chosen]), pytest.raises(WinnowError, match="names 1 videos of 2 frames"):
            forward(model, sample)
