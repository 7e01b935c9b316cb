"""A thumbnail among the frames of a video: where it stands, when, and how a model is given it."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import zoo
from probes import generate
from video_processor import VideoProcessor

import winnow
from winnow.core.errors import WinnowError
from winnow.models.inputs import model_inputs
from winnow.parts.thumbnail import thumbnail_of
from winnow.video import Video

BUILD, QUESTION = "qwen2_5_vl", "what is this ?"


def video(n: int) -> Video:
    return Video.of(np.random.default_rng(0).integers(0, 256, (n, 42, 56, 3), dtype=np.uint8), fps=2)


def sheet(own: Video, count: int = 6) -> np.ndarray:
    pixels = torch.from_numpy(own.frames).permute(0, 3, 1, 2).float()
    return thumbnail_of(pixels, count).round().byte().permute(1, 2, 0).numpy()


@pytest.mark.parametrize("where", ["last", "first"])
def test_the_thumbnail_is_a_frame_more(where):
    own = video(7)
    made = winnow.with_thumbnail(own, where=where)
    at, rest = (-1, slice(0, 7)) if where == "last" else (0, slice(1, 8))
    assert np.array_equal(made.frames[at], sheet(own))
    assert np.array_equal(made.frames[rest], own.frames)
    assert made.times == tuple(i / 2 for i in range(8))
    assert made.sampled.numbers[at] == -1
    assert made.sampled.numbers[rest] == tuple(range(7))
    assert made.sampled.kept == 8
    assert made.sampled.rule == "given, and a thumbnail of 6"
    assert made.metadata["frames_indices"] == [500 * i for i in range(8)]


@pytest.mark.parametrize(("n", "frames"), [(6, 8), (7, 10)])
def test_where_frames_are_taken_by_two_the_thumbnail_shares_with_none(n, frames):
    own = video(n)
    made = winnow.with_thumbnail(own, together=2)
    assert len(made) == frames == made.sampled.kept
    assert all(np.array_equal(made.frames[t], sheet(own)) for t in (-1, -2))
    assert np.array_equal(made.frames[frames - 3], own.frames[-1])
    first = winnow.with_thumbnail(own, together=2, where="first")
    assert first.times == made.times
    assert np.array_equal(first.frames[1], sheet(own))


def test_on_a_model_the_thumbnail_stays_whole():
    model, processor = zoo.model(BUILD), VideoProcessor(QUESTION)
    made = winnow.with_thumbnail(video(8), together=2)
    with winnow.compress(model, "ts-llava:keep=20,thumbnail=last", processor=processor) as handle:
        with handle.using(handle.plan, videos=[made]):
            generate(model, model_inputs(model, processor, made, QUESTION))
        (item,) = handle.last.items
    places = 12  # of two frames
    assert item.layout.n_content == 5 * places
    assert item.kept.tolist()[-places:] == list(range(4 * places, 5 * places))
    assert item.kept.tolist()[:-places] == [round(i * (4 * places - 1) / 7) for i in range(8)]
    assert "a thumbnail of 6" in str(item.frames)


def test_bad_settings_and_a_second_thumbnail_are_refused():
    with pytest.raises(WinnowError, match='allowed: "last" or "first"'):
        winnow.with_thumbnail(video(8), where="middle")  # type: ignore[arg-type]
    with pytest.raises(WinnowError, match="together=0"):
        winnow.with_thumbnail(video(8), together=0)
    with pytest.raises(WinnowError, match="allowed: 1 to 5"):
        winnow.with_thumbnail(video(5))
    with pytest.raises(WinnowError, match="has a thumbnail already"):
        winnow.with_thumbnail(winnow.with_thumbnail(video(8)))
