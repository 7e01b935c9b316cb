"""`winnow stream`: a video is read frame by frame and asked about, on the bundled model and on others."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from typer.testing import CliRunner
from video_assets import clip as encoded
from video_assets import frames

import winnow
from winnow import cli_stream
from winnow.cli import app
from winnow.reference import video
from winnow.reference.build import make_model, make_processor
from winnow.reference.presets import preset
from winnow.watch.clip_files import clip_in, save_clip
from winnow.watch.clip_inputs import ClipStream
from winnow.world.clips import clip

NAME = "clip:11"
FULL = ("--method", "full", "--unbounded")


@pytest.fixture(scope="module")
def bundled():
    return video.load()


@pytest.fixture(scope="module")
def film(tmp_path_factory):
    """The clip as a file."""
    path = tmp_path_factory.mktemp("films") / "clip.mp4"
    save_clip(clip(11, split="test"), path)
    return path


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory) -> str:
    """A tiny random model of pictures in a folder."""
    folder = tmp_path_factory.mktemp("checkpoint")
    make_model(preset("micro"), seed=5).save_pretrained(folder)
    make_processor(preset("micro")).save_pretrained(folder)
    return str(folder)


def stream(*arguments: object, code: int = 0):
    result = CliRunner().invoke(app, ["stream", *map(str, arguments)])
    assert result.exit_code == code, (result.output, result.stderr, result.exception)
    return result


def told(*arguments: object) -> dict:
    return json.loads(stream(*arguments, "--json").stdout)


def test_read_in_full_second_by_second_a_clip_is_what_it_is_as_one_video(bundled):
    """The logits behind a question, so that nothing is rounded to a word."""
    model, processor = bundled
    drawn = clip(11, split="test")
    seen: list[torch.Tensor] = []
    hook = model.register_forward_hook(lambda m, a, out: seen.append(out.logits[:, -1]))
    with winnow.stream(model, "full", bounded=False) as session:
        watched = ClipStream(model, processor)
        for frame in drawn.pixels:
            for part in watched.parts(frame):
                session.feed(part)
        assert watched.rest() == []
        found = []
        for question in drawn.questions:
            session.ask(watched.question(question.text), max_new_tokens=1)
            found.append(seen[-1])
        assert session.ledger.frames == drawn.seconds
    want = []
    for question in drawn.questions:
        with torch.no_grad():
            want.append(model(**processor(drawn.pixels, question.text)).logits[:, -1])
    hook.remove()
    assert (torch.cat(found) - torch.cat(want)).abs().max() <= 1e-4


def test_a_drawn_clip_brings_its_questions():
    drawn = clip(11, split="test")
    said = told(NAME, *FULL)
    assert [(a["question"], a["truth"]) for a in said["answers"]] == [(q.text, q.answer) for q in drawn.questions]
    right = sum(answer["answer"] == answer["truth"] for answer in said["answers"])
    assert right >= len(drawn.questions) / 2
    assert (said["frames"], said["seconds"], said["ended"]) == (16, 7.5, "end")
    assert said["tokens"]["given"] == said["tokens"]["kept"] == 72
    assert said["ms_per_frame"] > 0
    assert all(answer["time"] == 7.5 for answer in said["answers"])


def test_what_is_held_is_bounded_and_told():
    said = told("clip:3:96", "--method", "stc:keep=4 + snapkv:keep=64", "--ask", "is there a frog?")
    assert said["tokens"] == {"given": 432, "kept": 192, "held": 64.0}
    layers, heads, width = 8, 4, 48
    assert said["kv_bytes"] >= layers * heads * 64 * 2 * width * 4
    assert told("clip:3:32", "--method", "stc:keep=4 + snapkv:keep=64")["kv_bytes"] == said["kv_bytes"]


def test_questions_are_asked_when_they_are_due(film):
    asked = ("0:is there a frog?", "3:is there a ring?", "99:is there a sun?", "is there a moon?")
    arguments = [part for question in (*asked, "1.2:is there a key?") for part in ("--ask", question)]
    for source in (NAME, film):
        said = told(source, *arguments)
        assert [(a["time"], a["question"].split()[3]) for a in said["answers"]] == [
            (0.5, "frog?"), (1.0, "key?"), (3.0, "ring?"), (7.5, "sun?"), (7.5, "moon?")
        ]  # fmt: skip


def test_a_question_sees_nothing_of_what_comes_later(bundled):
    model, processor = bundled
    drawn = clip(11, split="test")
    questions = [q.text for q in drawn.questions]
    said = told(NAME, *FULL, *[part for text in questions for part in ("--ask", f"3.9:{text}")])
    early = [video.answer(model, processor, drawn.pixels[:8], text) for text in questions]
    assert [answer["answer"].split()[0] for answer in said["answers"]] == [answer.split()[0] for answer in early]
    assert any(answer["answer"] != answer["truth"] for answer in said["answers"] if answer["truth"])


def test_a_clip_in_a_file_is_recognised_and_answered_alike(film, tmp_path):
    drawn, filmed = told(NAME), told(film)
    assert [a["truth"] for a in filmed["answers"]] == [a["truth"] for a in drawn["answers"]]
    same = [a["answer"] == b["answer"] for a, b in zip(drawn["answers"], filmed["answers"], strict=True)]
    assert sum(same) >= len(same) - 1  # coding changes pixels a little
    assert "warning" not in filmed
    with winnow.video.read_video(film) as reading:
        pixels = next(iter(reading)).pixels
    assert clip_in(film, [pixels]) is not None
    assert clip_in(film, [255 - pixels]) is None
    forged = tmp_path / "forged.mp4"
    forged.write_bytes(film.read_bytes().replace(b'"seed": 11', b'"seed": 12'))
    assert clip_in(forged, [pixels]) is None


def test_another_video_gets_a_warning(tmp_path):
    path = tmp_path / "other.mp4"
    path.write_bytes(encoded(frames(24)))
    result = stream(path, "--ask", "is there a frog?", "--json")
    warning = json.loads(result.stdout)["warning"]
    assert "knows only winnow's own drawn clips" in warning
    assert warning in result.stderr


def test_a_checkpoint_sees_each_frame_as_a_picture(checkpoint, tmp_path):
    path = tmp_path / "clip.mp4"
    path.write_bytes(encoded(frames(24)))  # three seconds
    plan = "divprune:keep=8 + streaming-llm:keep=48"
    said = told(
        path, "--model", checkpoint, "--method", plan, "--fps", 4, "--ask", "1:is there a ring?", "--ask", "who?"
    )
    assert said["frames"] == 12
    assert said["tokens"] == {"given": 64 * 12, "kept": 8 * 12, "held": 48.0}
    assert [answer["time"] for answer in said["answers"]] == [1.0, 2.75]
    assert (said["source"]["given"], said["source"]["taken"]) == (24, 12)
    stamped = told(path, "--model", checkpoint, "--method", plan, "--stamp", "{time:.0f} ", "--ask", "who?")
    assert stamped["frames"] == 6


def test_what_people_see():
    shown = stream(NAME, "--ask", "4:is there a frog?").stdout
    first, answer, summary = shown.splitlines()
    assert NAME in first
    assert cli_stream.PLAN in first
    assert answer.split()[:6] == ["4.00", "s", "is", "there", "a", "frog?"]
    assert summary.startswith("16 frames, 7.5 s; ")
    assert "ms a frame" in summary


def test_a_damaged_video_is_read_up_to_the_damage(tmp_path):
    noise = np.random.default_rng(0).integers(0, 256, (24, 48, 64, 3), dtype=np.uint8)
    whole = encoded(noise, gop=4, faststart=True)
    (tmp_path / "cut.mp4").write_bytes(whole[: len(whole) // 2])
    result = stream(tmp_path / "cut.mp4", "--ask", "is there a frog?")
    assert "warning: the video is damaged" in result.stderr


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (("nowhere.mp4",), "not a readable, regular file"),
        (("{avi}",), "AVI is not supported"),
        (("{text}",), "this is not a video"),
        (("https://example.com/a.mp4",), "nothing is fetched"),
        (("clip:seven",), "clip:SEED"),
        ((NAME, "--ask", "3: "), "asks nothing"),
        ((NAME, "--ask", "where is the zebracorn?"), "does not know"),
        ((NAME, "--method", "stc"), "bounds what the cache"),
        ((NAME, "--method", "fastv + snapkv:keep=64"), "looks at the text"),
        ((NAME, "--method", "snapkv:keep=20%"), "bounds what the cache"),
        ((NAME, "--fps", 5), "two frames a second"),
        ((NAME, "--dtype", "bfloat16"), "--device alone"),
        ((NAME, "--stamp", "{{time}} "), "needs processor="),
    ],
)
def test_a_mistake_is_one_line_and_exit_code_2(arguments, says, tmp_path):
    (tmp_path / "avi").write_bytes(b"RIFF\0\0\0\0AVI LIST")
    (tmp_path / "text").write_text("where is the cup?")
    places = {name: tmp_path / name for name in ("avi", "text")}
    result = stream(*[str(a).format(**places) for a in arguments], code=2)
    assert says in result.stderr
    assert result.stderr.count("\n") == 1


def test_an_interrupt_ends_it_with_what_was_answered(monkeypatch):
    """Between two frames; the model is left as it was."""
    from winnow.watch.viewer import Seconds

    feed, count = Seconds.feed, iter(range(99))

    def interrupted(self, frame):
        if next(count) == 9:
            raise KeyboardInterrupt
        return feed(self, frame)

    monkeypatch.setattr(Seconds, "feed", interrupted)
    result = stream(NAME, "--ask", "2:is there a frog?", "--ask", "is there a ring?", "--json", code=130)
    said = json.loads(result.stdout)
    assert said["ended"] == "interrupted"
    assert [answer["question"] for answer in said["answers"]] == ["is there a frog?"]
    assert result.stderr == ""
