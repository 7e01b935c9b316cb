"""No other page, host or user drives the studio; the page itself holds no secret and asks nobody else."""

from __future__ import annotations

import json
import re
from importlib.resources import files

import pytest
from serve.process import MOTORCYCLE

from studio.process import StudioServer

ASKED = json.dumps({"picture": "world:54", "question": MOTORCYCLE, "plan": "full"}).encode()
PAGE = {file.name: file.read_text(encoding="utf-8") for file in (files("winnow") / "studio" / "page").iterdir()}
ROUTES = [("GET", "/api/about"), ("POST", "/api/look"), ("POST", "/api/answer"), ("POST", "/api/report")]


@pytest.mark.parametrize(("verb", "path"), ROUTES)
@pytest.mark.parametrize("key", ["", "wrong", "key-of-the-tests"])
def test_what_the_page_calls_asks_for_the_key_of_this_run(studio: StudioServer, verb: str, path: str, key: str):
    answer = studio.send(verb, path, ASKED if verb == "POST" else None, key=key)
    assert (answer.status, answer.error["code"]) == (401, "invalid_api_key")


@pytest.mark.parametrize("path", ["/", "/studio.js", "/api/about", "/report/x"])
@pytest.mark.parametrize("host", ["evil.example", "evil.example:7861", "127.0.0.1.evil.example", ""])
def test_another_host_is_not_served(studio: StudioServer, path: str, host: str):
    """A name that an attacker points to this machine (DNS rebinding)."""
    answer = studio.send("GET", path, host=host)
    assert (answer.status, answer.error["code"]) == (403, "host_not_allowed")


@pytest.mark.parametrize(
    "headers",
    [
        {"origin": "http://evil.example"},
        {"origin": "null"},
        {"origin": "http://127.0.0.1:1"},
        {"sec_fetch_site": "cross-site"},
        {"sec_fetch_site": "same-site"},
    ],
)
def test_another_page_cannot_call_even_with_the_key(studio: StudioServer, headers: dict[str, str]):
    for verb, path in (*ROUTES, ("GET", "/report/x")):
        answer = studio.send(verb, path, ASKED if verb == "POST" else None, **headers)
        assert (answer.status, answer.error["code"]) == (403, "foreign_origin"), path


def test_the_own_page_can(studio: StudioServer):
    own = {"origin": f"http://127.0.0.1:{studio.port}", "sec_fetch_site": "same-origin"}
    assert studio.send("POST", "/api/answer", ASKED, **own).status == 200


def test_a_form_of_another_page_is_no_request(studio: StudioServer):
    """Types that a page may send anywhere without being asked."""
    for kind in ("text/plain", "application/x-www-form-urlencoded", "multipart/form-data; boundary=x"):
        assert studio.send("POST", "/api/answer", ASKED, content_type=kind).status == 415


def test_no_page_is_told_that_it_may_call(studio: StudioServer):
    asking = {"origin": "http://evil.example", "access_control_request_method": "POST"}
    answer = studio.send("OPTIONS", "/api/answer", key="", **asking)
    assert answer.status in (401, 403)
    assert not [name for name in answer.headers if name.startswith("access-control")]


def test_the_page_loads_nothing_from_elsewhere_and_runs_nothing_but_its_files(studio: StudioServer):
    policy = {
        part.split()[0]: part.split()[1:]
        for part in studio.send("GET", "/", key="").headers["content-security-policy"].split(";")
    }
    assert policy["default-src"] == policy["frame-ancestors"] == policy["base-uri"] == ["'none'"]
    assert policy["script-src"] == policy["style-src"] == policy["connect-src"] == policy["frame-src"] == ["'self'"]
    for name, text in PAGE.items():
        assert not re.search(r"https?://|//\w|\bimport\(|\beval\(|innerHTML|insertAdjacentHTML", _code(text)), name
        answer = studio.send("GET", "/" if name == "index.html" else f"/{name}", key="")
        assert (answer.status, answer.body.decode()) == (200, text)
        assert answer.headers["x-content-type-options"] == "nosniff"
    assert not re.search(r"<script(?![^>]*\bsrc=)|\son\w+=|\sstyle=", PAGE["index.html"])


def _code(text: str) -> str:
    """A file without its comments, which begin a line or follow a blank."""
    return re.sub(r"(^|\s)// .*$", "", text, flags=re.M)


def test_the_page_holds_no_secret(studio: StudioServer):
    for name in PAGE:
        assert studio.key not in studio.send("GET", "/" if name == "index.html" else f"/{name}", key="").body.decode()
    assert studio.send("GET", "/studio.py").status == 404
    assert studio.send("GET", "/../guard.py").status == 404
