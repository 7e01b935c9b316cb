"""A sweep of clips: requests, baselines in time, what is shown less, and the same answers as `generate`."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from winnow.bench.baselines import Seconds, choose, whole_frames
from winnow.bench.clips import blind, clip_task, learned_types, open_clip, shuffled, single_frame
from winnow.bench.plans import jobs
from winnow.bench.processes import Sweep
from winnow.bench.requests import request
from winnow.bench.runner import bench
from winnow.bench.store import Store
from winnow.bench.summary import summarise
from winnow.core.budget import Budget
from winnow.core.errors import WinnowError
from winnow.core.layout import Layout
from winnow.core.view import View
from winnow.reference import video
from winnow.world.clips import TYPES

GRID = Layout.grid(3, 3, 8)


@pytest.fixture(scope="module")
def little():
    torch.set_num_threads(1)
    model = video.make_model(video.config(width=48, depth=2, tower_heads=2, layers=4, heads=2, inner=64), 3).eval()
    generator = torch.Generator().manual_seed(3)
    for name, weight in model.named_parameters():
        if weight.ndim == 2:
            scale = 0.5 if "embed_tokens" in name else 1.5 / math.sqrt(weight.shape[1])
            weight.data.normal_(0, scale, generator=generator)
    return model, video.ClipProcessor(video.make_tokenizer())


@pytest.fixture(scope="module")
def task():
    return clip_task(2 * len(TYPES))


def test_a_task_asks_all_types_and_can_be_opened_again(task):
    kinds = [ask.type for ask in task.questions]
    assert {kind: kinds.count(kind) for kind in TYPES} == dict.fromkeys(TYPES, 2)
    again = clip_task(2 * len(TYPES))
    assert again.settings == task.settings
    assert again.settings != clip_task(2 * len(TYPES), seed=1).settings
    pixels = open_clip(task.questions[0])
    assert pixels.shape == (16, 84, 84, 3)
    with pytest.raises(WinnowError, match="at least 1"):
        clip_task(0)


def test_a_sweep_asks_the_types_that_the_model_has_learned(tmp_path):
    learned = learned_types()
    assert learned == ("presence", "color", "order", "motion", "cause", "when", "needle")
    assert learned_types(tmp_path) == TYPES
    (tmp_path / "card.json").write_text('{"learned": ["order", "presence"]}')
    assert learned_types(tmp_path) == ("presence", "order")
    sweep = Sweep("", ("evs",), ("25%",), questions=7, clips=16)
    assert {ask.type for ask in sweep.task(None).questions} == set(learned)
    other = Sweep("", ("evs",), ("25%",), questions=2, clips=16, types=("cuts",))
    assert {ask.type for ask in other.task(None).questions} == {"cuts"}
    with pytest.raises(WinnowError, match="no questions of colour; allowed: presence"):
        clip_task(7, types=("colour",))


def test_what_is_shown_less(task):
    ask = task.questions[0]
    pixels = open_clip(ask)
    assert set(task.shows) == {"blind", "shuffled", "single-frame"}
    assert np.unique(blind(pixels, ask)).tolist() == [128]
    mixed = shuffled(pixels, ask)
    assert np.array_equal(mixed, shuffled(pixels, ask))
    assert not np.array_equal(mixed, pixels)
    assert sorted(f.tobytes() for f in mixed) == sorted(f.tobytes() for f in pixels)
    assert all(np.array_equal(frame, pixels[8]) for frame in single_frame(pixels, ask))


@pytest.mark.parametrize("m", [1, 5, 9, 18, 20, 36, 72])
def test_whole_seconds_are_kept(m):
    kept = whole_frames(GRID, m)
    assert len(set(kept)) == m
    counts = np.bincount(GRID.place[list(kept), 1], minlength=8)
    assert sorted(counts.tolist(), reverse=True)[: m // 9] == [9] * (m // 9)
    assert (counts > 0).sum() == -(-m // 9)
    view = View.of(torch.randn(2, 72, 4), layout=GRID)
    assert Seconds(Budget(m)).reduce(view).kept[0].nonzero()[:, 0].tolist() == list(kept)
    with pytest.raises(WinnowError, match="one frame"):
        whole_frames(Layout.grid(3, 3), 4)


def test_the_ceiling_keeps_evidence_in_space_and_time(task, little):
    ask = next(ask for ask in task.questions if ask.type == "needle")
    asked = request(*little, task, ask)
    matters = np.flatnonzero(GRID.covering(asked.evidence))
    assert len(set(GRID.place[matters, 1].tolist())) == 1
    assert set(choose("ceiling", ask, GRID, 9, asked.evidence, asked.objects)[1]) >= set(matters.tolist())
    assert set(choose("oracle", ask, GRID, 9, asked.evidence, asked.objects)[1]) == set(matters.tolist())


def test_a_sweep_of_clips(tmp_path, task, little):
    """Every answer is checked against `generate` with the pixels; evidence recall is that of the kept seconds."""
    model, processor = little
    with Store(tmp_path / "runs.sqlite", create=True) as store:
        baselines = ("random", "seconds", "ceiling")
        run = bench(
            model, processor, ("divprune",), ("18",), task, store, baselines=baselines, batch=4, max_new_tokens=3
        )
        rows = {row.cell.label: row for row in summarise(store, run)}
    labels = {
        "full",
        "blind",
        "shuffled",
        "single-frame",
        "random-M",
        "seconds-M",
        "downsample-M",
        "ceiling",
        "divprune",
    }
    assert set(rows) == labels
    assert all(row.cell.status in ("", "ok", "done") for row in rows.values()), [r.cell.status for r in rows.values()]
    assert rows["full"].recall == 1
    assert rows["seconds-M"].kept == rows["divprune"].kept == 18
    assert rows["blind"].kept == 72
    assert rows["ceiling"].recall > rows["random-M"].recall
    assert rows["full"].asked == 2 * len(TYPES)


def test_seconds_are_a_baseline_that_must_be_named():
    assert not any(job.cell.label == "seconds-M" for job in jobs(("fastv",), ("4",), 72))
    assert any(job.cell.label == "seconds-M" for job in jobs(("fastv",), ("4",), 72, baselines=("seconds",)))
    with pytest.raises(WinnowError, match="seconds"):
        jobs(("fastv",), ("4",), 72, baselines=("minutes",))


def test_clips_need_the_video_reference_model(task, little):
    with pytest.raises(WinnowError, match="video reference model"):
        request(little[0], object(), task, task.questions[0])
