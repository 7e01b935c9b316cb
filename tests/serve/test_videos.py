"""Videos in requests: answers of the library, and what is refused."""

from __future__ import annotations

import base64
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from video_assets import clip

import winnow
from serve.process import MOTORCYCLE, Answer, Server, check_tells_nothing, drawn, running, url, user
from winnow.reference import video
from winnow.video import Sampling
from winnow.world.clips import clip as drawn_clip

FRAMES = 16
CLIP = drawn_clip(0, split="test")
FILE = clip(CLIP.pixels, fps=2)
QUESTION = CLIP.questions[0].text


@pytest.fixture(scope="module")
def films(tests_importable: None, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    folder = tmp_path_factory.mktemp("films")
    options = ("--method", "full", "--frames", str(FRAMES), "--min-keep", "4", "--max-body", "4", "--allow")
    with running(folder, *options, "divprune,fastv,kffocus", program="serve.films") as server:
        yield server
        assert server.process.poll() is None, server.log
        assert list(folder.iterdir()) == []


def shown(data: bytes | str) -> dict[str, Any]:
    where = data if isinstance(data, str) else "data:video/mp4;base64," + base64.b64encode(data).decode()
    return {"type": "video_url", "video_url": {"url": where}}


def ask(server: Server, *parts: dict[str, Any], question: str = QUESTION, **fields: Any) -> Answer:
    content = [*parts, {"type": "text", "text": question}]
    return server.chat(messages=[{"role": "user", "content": content}], **fields)


@pytest.mark.parametrize("plan", ["full", "divprune:keep=20", "fastv:keep=20"])
def test_answers_are_those_of_the_library(films: Server, plan: str) -> None:
    model, processor = video.load()
    taken = winnow.open_video(FILE, sampling=Sampling.count(FRAMES))
    for question in (own.text for own in CLIP.questions[:3]):
        inputs = processor(taken.frames, question)
        with winnow.compress(model, plan) as handle, torch.no_grad():
            ids = model.generate(**inputs, max_new_tokens=4, do_sample=False)
            kept = len(handle.last.items[0].kept)
        answer = ask(films, shown(FILE), question=question, winnow={"plan": plan}, max_tokens=4)
        assert answer.status == 200, answer.body
        said = processor.tokenizer.decode(ids[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
        assert answer.text.strip() == said.strip()
        assert answer.json["usage"]["winnow"] == {"given": 72, "kept": kept, "plan": plan}
    assert kept == (72 if plan == "full" else 20)


def test_pictures_are_answered_beside_videos(films: Server) -> None:
    answer = films.ask(QUESTION, drawn(54).image, max_tokens=2)
    assert answer.status == 200
    assert answer.json["usage"]["winnow"]["given"] == 4


BROKEN = [
    (FILE[:300], "invalid_video"),
    (b"no video at all", "invalid_video"),
    (base64.b64decode(url(drawn(54).image).partition(",")[2]), "invalid_video"),
    ("data:video/mp4;base64,!!!", "bad_base64"),
    ("data:video/mp4,AAAA", "bad_base64"),
    ("https://127.0.0.1/clip.mp4", "invalid_video_url"),
    ("file:///etc/passwd", "invalid_video_url"),
]


@pytest.mark.parametrize(("data", "code"), BROKEN, ids=[str(own[0])[:24] for own in BROKEN])
def test_what_is_no_video_is_refused(films: Server, data: bytes | str, code: str) -> None:
    answer = ask(films, shown(data))
    assert answer.status in (400, 415)
    assert answer.error["code"] == code
    check_tells_nothing(answer)


def test_one_video_and_nothing_beside_it(films: Server) -> None:
    picture = user("", drawn(54).image)["content"][0]
    for parts in ((shown(FILE), shown(FILE)), (shown(FILE), picture)):
        answer = ask(films, *parts)
        assert (answer.status, answer.error["code"]) == (400, "too_many_videos")
    given = shown(FILE)
    given["video_url"]["detail"] = "low"
    assert ask(films, given).status == 400
    assert ask(films, given | {"fps": 2}).status == 400


def test_plans_that_choose_frames_and_budgets_out_of_bounds(films: Server) -> None:
    chooses = ask(films, shown(FILE), winnow={"plan": "kffocus"})
    assert chooses.status == 400
    assert chooses.error["param"] == "winnow.plan"
    few = ask(films, shown(FILE), winnow={"plan": "divprune:keep=3"})
    assert (few.status, few.error["code"]) == (400, "invalid_plan")
    assert "3 of the 72 tokens" in few.error["message"]


def test_a_model_without_videos_says_so(server: Server) -> None:
    answer = ask(server, shown(FILE), question=MOTORCYCLE)
    assert (answer.status, answer.error["code"]) == (400, "unsupported_value")
    assert "takes no videos" in answer.error["message"]


def test_a_body_that_is_too_long(films: Server) -> None:
    answer = ask(films, shown(b"\0" * (4 * 2**20)))
    assert (answer.status, answer.error["code"]) == (413, "request_too_large")
