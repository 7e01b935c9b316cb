"""Requests that are wrong get a clear text and cost nothing; nothing that a request names is opened."""

from __future__ import annotations

import json
import time
from typing import Any

import media_assets as assets
import pytest
from PIL import Image
from serve.process import MOTORCYCLE, Answer, check_tells_nothing, drawn, url
from serve.test_requests import BODIES, PLANS

from studio.process import BROKEN, STORE, StudioServer

MIB = 2**20
ALLOWED_HERE = ("a method that is not allowed", "more than is allowed, without a method")
ALLOWED_HERE += ("a huge number", "more than is allowed", "more than is allowed, as a share")
FIELDS: list[tuple[dict[str, Any], str]] = [
    ({"question": ""}, "Ask a question"),
    ({"question": " \n"}, "Ask a question"),
    ({"question": None}, "Ask a question"),
    ({"question": ["what"]}, "Ask a question"),
    ({"question": "a" * 2001}, "at most 2000"),
    ({"question": "what is <image> this?"}, "control token"),
    ({"question": "what \ud800 is"}, "not text"),
    ({"runs": 0}, "from 1 to 20"),
    ({"runs": 21}, "from 1 to 20"),
    ({"runs": True}, "from 1 to 20"),
    ({"runs": "3"}, "from 1 to 20"),
    ({"max_new_tokens": 257}, "from 1 to 256"),
    ({"keep": 0.25}, "as text"),
    ({"keep": "1e9"}, "as text"),
    ({"keep": "-5"}, "as text"),
    ({"keep": "0"}, "keeps nothing"),
    ({"keep": "400%"}, "outside"),
    ({"keep": "50%", "plan": "full"}, "one method"),
    ({"keep": "50%", "plan": "hiprune + fastv"}, "one method"),
    ({"keep": "50%", "plan": "gear"}, "gear has no setting"),
    ({"plan": None}, "plan must be"),
    ({"plan": 5}, "plan must be"),
    ({"temperature": 1}, "Unknown field"),
    ({"x" * 5000: 1}, "Unknown field"),
]
PICTURES: list[tuple[Any, str]] = [
    (None, "world:SEED"),
    (54, "world:SEED"),
    ({"url": "x"}, "world:SEED"),
    ("", "no file and no address"),
    ("/etc/passwd", "no file and no address"),
    ("../scene.png", "no file and no address"),
    ("file:///etc/passwd", "no file and no address"),
    ("http://127.0.0.1:1/a.png", "no file and no address"),
    ("world:", "whole number"),
    ("world:-1", "whole number"),
    ("world:1e3", "whole number"),
    ("world:" + "9" * 400, "whole number"),
    ("world:٣", "whole number"),
    ("data:,x", "data: URL must read"),
    ("data:image/png;base64,***", "not valid base64"),
    (url(b""), "not a picture"),
    (url(b"text"), "not a picture"),
    (url(assets.encode(drawn(54).image, "PNG")[:500]), "cut off"),
    (url(assets.png_bomb(9_400)), "pixels"),
    (url(assets.encode(Image.new("RGB", (1, 300)), "PNG")), "long side"),
]


def refused(answer: Answer, status: int = 400) -> str:
    assert answer.status == status, answer.body
    check_tells_nothing(answer)
    return answer.error["message"]


@pytest.mark.parametrize(("fields", "said"), FIELDS)
def test_fields(studio: StudioServer, fields: dict[str, Any], said: str):
    given = {"picture": "world:54", "question": MOTORCYCLE, "plan": "hiprune"} | fields
    assert said in refused(studio.call("answer", **given))


@pytest.mark.parametrize("name", [name for name in PLANS if name not in ALLOWED_HERE])
def test_plans(studio: StudioServer, name: str):
    assert refused(studio.ask(MOTORCYCLE, "world:54", PLANS[name])).startswith("plan")


@pytest.mark.parametrize(("picture", "said"), PICTURES)
def test_pictures(studio: StudioServer, picture: Any, said: str):
    for path, rest in (("look", {}), ("answer", {"question": MOTORCYCLE, "plan": "full"})):
        answer = studio.call(path, picture=picture, **rest)
        assert said in refused(answer, 413 if said == "pixels" else 400)


@pytest.mark.parametrize("kind", assets.foreign_files())
def test_formats_that_are_not_taken(studio: StudioServer, kind: str):
    answer = studio.call("look", picture=url(assets.foreign_files()[kind]))
    assert answer.status in (400, 415)
    assert "PNG, JPEG, WebP, GIF or BMP" in answer.error["message"]


def test_a_bomb_costs_no_memory(studio: StudioServer):
    before = studio.memory("VmHWM")
    for data in (assets.png_bomb(9_400), *assets.huge_headers(16_000).values()):
        refused(studio.call("look", picture=url(data)), 413)
    assert studio.memory("VmHWM") - before < 50 * MIB


@pytest.mark.parametrize("name", BODIES)
def test_bodies(studio: StudioServer, name: str):
    for path in ("look", "answer", "report"):
        assert refused(studio.send("POST", f"/api/{path}", BODIES[name])).startswith("The body cannot be read")


def test_a_body_that_is_too_long_is_not_read(studio: StudioServer):
    answer = studio.send("POST", "/api/look", b"{}", content_length=str(33 * MIB))
    assert "bytes" in refused(answer, 413)


@pytest.mark.parametrize(
    "store", [None, 5, "", "/etc/passwd", "../runs.sqlite", "./" + STORE, "file:runs.sqlite?mode=rw", "x" * 10_000]
)
def test_stores_that_the_studio_was_not_started_with(studio: StudioServer, store: Any):
    said = refused(studio.call("report", store=store))
    assert "not started with this store" in said or "one of the names" in said


def test_a_file_that_is_no_store_is_told(studio: StudioServer):
    assert "is not an SQLite file" in refused(studio.call("report", store=BROKEN))


@pytest.mark.parametrize("path", ["/report/", "/report/x", "/report/../api/about", "/x", "/api", "/api/x", "/%00"])
def test_paths_that_are_not_there(studio: StudioServer, path: str):
    assert studio.send("GET", path).status == 404


def test_a_plan_that_this_model_refuses_is_told(studio: StudioServer):
    said = refused(studio.ask(MOTORCYCLE, "world:54", "fastv:layer=90"))
    assert "layer=90" in said
    assert "8 LM layers" in said


def test_a_client_that_leaves_is_no_loss(studio: StudioServer):
    body = json.dumps({"picture": "world:54", "question": MOTORCYCLE, "plan": "full"}).encode()
    head = f"POST /api/answer HTTP/1.1\r\nhost: 127.0.0.1\r\nauthorization: Bearer {studio.key}\r\n"
    head += f"content-type: application/json\r\ncontent-length: {len(body)}\r\n\r\n"
    for sent in (10, len(body)):
        start = time.monotonic()
        studio.raw(head.encode() + body[:sent], shut=True)
        assert time.monotonic() - start < 20
