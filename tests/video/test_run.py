"""`winnow run` on a video: answers, what the ledger says of its frames, and its overlays."""

from __future__ import annotations

import json

import av
import numpy as np
import pytest
import zoo
from PIL import Image
from probes import Pick
from typer.testing import CliRunner
from video_assets import clip, frames
from video_processor import VideoProcessor

from winnow import cli_run
from winnow.cli import app
from winnow.core.budget import Budget
from winnow.core.errors import WinnowError
from winnow.core.layout import Layout
from winnow.core.plan import Plan
from winnow.video import Sampling, Video
from winnow.video.overlay import contact_sheet, film, save_film

from .test_frames_point import Novel

QUESTION = "what is this ?"


@pytest.fixture
def tiny(monkeypatch):
    """A tiny build in the place of a checkpoint."""
    made = zoo.model("qwen2_5_vl"), VideoProcessor(QUESTION)
    monkeypatch.setattr("winnow.models.load.load", lambda *a, **k: made)
    return made


@pytest.fixture
def path(tmp_path):
    made = tmp_path / "clip.mp4"
    made.write_bytes(clip(frames(24)))
    return made


def run(*arguments: object, code: int = 0):
    result = CliRunner().invoke(app, ["run", *map(str, arguments)])
    assert result.exit_code == code, (result.output, result.stderr, result.exception)
    return result


def test_a_video_answered_with_and_without_compression(tiny, path):
    more = ("--method", "divprune:keep=7", "--max-new-tokens", 3, "--runs", 1, "--json", "--model", "tiny")
    said = json.loads(run(path, QUESTION, "--frames", 6, *more).stdout)
    assert {name: said["video"][name] for name in ("rule", "given", "kept", "numbers")} == {
        "rule": "6 evenly",
        "given": 24,
        "kept": 6,
        "numbers": [2, 6, 10, 14, 18, 22],
    }
    (method,) = said["methods"]
    assert method["points"] == [{"point": "projected", "method": "divprune", "from": 36, "to": 7}]
    assert said["plain"]["tokens"]["visual"] == 36
    assert said["plain"]["flops"] > method["flops"]


@pytest.mark.parametrize(
    ("rule", "says"),
    [
        ((), "8 of 24 frames (8 evenly)"),
        (("--frames", 3), "3 of 24 frames (3 evenly)"),
        (("--fps", 2), "6 of 24 frames (2 per second)"),
        (("--keyframes",), "2 of 24 frames (keyframes)"),
    ],
)
def test_the_rule_is_said(tiny, path, rule, says):
    shown = run(path, QUESTION, *rule, "--runs", 1, "--max-new-tokens", 2, "--model", "tiny", "--method", "full").stdout
    assert f"video: {says}" in shown


def test_a_gif_is_a_picture_unless_frames_are_asked_for(tmp_path):
    path = tmp_path / "clip.gif"
    path.write_bytes(clip(frames(6), codec="gif", container="gif"))
    assert cli_run.subject(str(path), QUESTION).video is None
    assert len(cli_run.subject(str(path), QUESTION, Sampling.count(3)).video) == 3


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (("{path}", QUESTION, "--frames", 4, "--fps", 2), "exclude one another"),
        (("{path}", QUESTION, "--frames", 0), "from 1"),
        (("{path}", QUESTION, "--frames", 1000), "at most 256"),
        (("{path}",), "What do you want to ask"),
        (("{path}", QUESTION), "does not know the words this: ask as"),
        (("world:3", "--fps", 2), "is a picture"),
        (("{picture}", QUESTION, "--keyframes"), "is not a video"),
        (("{picture}", QUESTION, "--overlay", "out.mp4"), "is a picture"),
        (("{avi}", QUESTION), "AVI is not supported"),
        (("{cut}", QUESTION), "cannot be read"),
    ],
)
def test_a_mistake_is_one_line_and_exit_code_2(arguments, says, path, tmp_path):
    places = {name: tmp_path / name for name in ("picture", "avi", "cut")} | {"path": path}
    Image.new("RGB", (30, 30)).save(places["picture"], "PNG")
    places["avi"].write_bytes(b"RIFF\0\0\0\0AVI LIST")
    places["cut"].write_bytes(path.read_bytes()[:400])
    result = run(*[str(a).format(**places) for a in arguments], "--runs", 1, code=2)
    assert says in result.stderr
    assert result.stderr.count("\n") == 1


def test_a_damaged_video_is_answered_with_a_warning(tiny, tmp_path):
    noise = np.random.default_rng(0).integers(0, 256, (24, 48, 64, 3), dtype=np.uint8)
    whole = clip(noise, gop=4, faststart=True)
    cut = tmp_path / "cut.mp4"
    cut.write_bytes(whole[: len(whole) // 2])
    result = run(cut, QUESTION, "--runs", 1, "--max-new-tokens", 2, "--model", "tiny", "--method", "full")
    assert "warning: the video is damaged" in result.stderr


def test_frames_that_a_plan_chooses_have_a_row_and_the_plain_answer_sees_all(tiny, path, tmp_path):
    asked = cli_run.subject(str(path), QUESTION, Sampling.count(8))
    wanted = [Plan((Novel(Budget(4)),)), Plan((Novel(Budget(4)), Pick(Budget(5))))]
    out = tmp_path / "kept.png"
    said = cli_run.compare(*tiny, asked, wanted, max_new_tokens=2, runs=1, picture=out)
    assert said["plain"]["tokens"]["visual"] == 4 * 12
    rows = [{"point": "frames", "method": "novel", "from": 8, "to": 4}]
    assert said["methods"][0]["points"] == rows
    assert said["methods"][1]["points"] == [*rows, {"point": "projected", "method": "pick", "from": 24, "to": 5}]
    assert [method["tokens"]["visual"] for method in said["methods"]] == [24, 5]
    costs = [said["plain"]["flops"], *(method["flops"] for method in said["methods"])]
    assert costs == sorted(costs, reverse=True)
    assert all(Image.open(method["overlay"]).width > 480 for method in said["methods"])


@pytest.mark.parametrize("name", ["kept.png", "kept.gif", "kept.mp4"])
def test_overlays_of_a_video(tiny, path, tmp_path, name):
    out = tmp_path / name
    more = ("--method", "divprune:keep=7", "--runs", 1, "--max-new-tokens", 2, "--model", "tiny", "--overlay", out)
    assert f"drawn in {out}" in run(path, QUESTION, "--frames", 6, *more).stdout
    if name == "kept.mp4":
        with av.open(str(out)) as made:
            assert sum(1 for _ in made.decode(video=0)) == 6
    elif name == "kept.gif":
        assert Image.open(out).n_frames == 6
    assert sorted(p.name for p in tmp_path.iterdir()) == ["clip.mp4", name]


def drawn(kept: list[int]) -> tuple[Video, Layout, list[int]]:
    """Four bright frames of two rows in time, of 2 × 2 tokens each."""
    return Video.of(np.full((4, 240, 240, 3), 200, np.uint8), fps=2), Layout.grid(2, 2, 2), kept


def test_dropped_tokens_are_dim_and_kept_ones_clear_in_the_frames_that_share_them():
    sheet = np.asarray(contact_sheet(*drawn([0, 7])))
    right, below = 240 + 6, 240 + 20 + 6  # two in a row
    for top, left in ((0, 0), (0, right)):  # the frames 0 and 1 share the tokens 0 to 3
        assert (sheet[top + 60, left + 60] == 200).all()
        assert (sheet[top + 180, left + 180] < 130).all()
    for top, left in ((below, 0), (below, right)):
        assert (sheet[top + 60, left + 60] < 130).all()
        assert (sheet[top + 180, left + 180] == 200).all()


@pytest.mark.parametrize(("count", "columns"), [(1, 1), (2, 2), (3, 3), (8, 4), (16, 4), (17, 6), (24, 6)])
def test_a_sheet_has_few_empty_places(count, columns):
    video = Video.of(np.full((count, 40, 40, 3), 200, np.uint8), fps=2)
    sheet = contact_sheet(video, Layout.grid(2, 2, count), [0])
    assert (sheet.width + 6) // (240 + 6) == columns


def test_a_layout_of_more_frames_than_the_video_is_refused():
    video, layout, kept = drawn([0])
    with pytest.raises(WinnowError, match="2 frames and the video 1"):
        contact_sheet(video.take([0]), layout, kept)


def test_a_film_has_another_ending_or_none(tmp_path):
    with pytest.raises(WinnowError, match=r"\.mp4, \.gif"):
        save_film(film(*drawn([0])), tmp_path / "film.avi")
