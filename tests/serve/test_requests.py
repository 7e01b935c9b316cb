"""Requests that are wrong or hostile: rows W1 to W4 and W9 to W15."""

from __future__ import annotations

import json
import re
import time
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest

from serve.process import KEY, MOTORCYCLE, NAME, Answer, Server, check_tells_nothing, drawn, user

CHAT = "/v1/chat/completions"
HEAD = b"POST /v1/chat/completions HTTP/1.1\r\nhost: localhost\r\nauthorization: Bearer " + KEY.encode() + b"\r\n"
JSON = HEAD + b"content-type: application/json\r\n"


def code(answer: Answer) -> tuple[int, str | None]:
    check_tells_nothing(answer)
    return answer.status, answer.error["code"]


def small(**fields: Any) -> dict[str, Any]:
    return {"model": NAME, "messages": [user(MOTORCYCLE)]} | fields


BODIES = {
    "empty": b"",
    "no JSON": b"model=x&messages=y",
    "cut": json.dumps(small()).encode()[:-1],
    "nested": b"[" * 50_000,
    "nested objects": b'{"a":' * 40_000,
    "no UTF-8": b'{"model": "\xff\xfe"}',
    "UTF-16": json.dumps(small()).encode("utf-16"),
    "a key twice": b'{"model": "a", "model": "b"}',
    "a key twice, inside": b'{"model": "a", "winnow": {"plan": "x", "plan": "y"}}',
    "a huge integer": b'{"seed": 1' + b"0" * 10_000 + b"}",
    "a huge float": b'{"temperature": 1e999}',
    "NaN": b'{"temperature": NaN}',
    "Infinity": b'{"temperature": -Infinity}',
    "a list": b"[]",
    "a text": b'"model"',
    "null": b"null",
}


@pytest.mark.parametrize("name", BODIES)
def test_W1_bodies_that_are_no_json_object(server: Server, name: str) -> None:
    answer = server.send("POST", CHAT, BODIES[name])
    assert code(answer) == (400, "invalid_json")


def test_W1_nesting_and_values_without_end(server: Server) -> None:
    before = server.memory("VmHWM")
    for body in (b"[" * 10**6, b"[]," * 10**6, b'{"a":1,' * 10**5):
        assert code(server.send("POST", CHAT, body)) == (413, "request_too_large")
    assert server.memory("VmHWM") - before < 50 * 2**20


@pytest.mark.parametrize("kind", ["text/plain", "application/x-www-form-urlencoded", "multipart/form-data", ""])
def test_W1_another_content_type(server: Server, kind: str) -> None:
    answer = server.send("POST", CHAT, json.dumps(small()).encode(), content_type=kind)
    assert code(answer) == (415, "unsupported_media_type")


def test_W1_a_compressed_body(server: Server) -> None:
    answer = server.send("POST", CHAT, json.dumps(small()).encode(), content_encoding="gzip")
    assert code(answer) == (415, "unsupported_media_type")


def test_W1_no_http_at_all(server: Server) -> None:
    for data in (b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc", b"GET / HTTP/9\r\n\r\n", b"hello\r\n\r\n"):
        said = server.raw(data, shut=True)
        assert said.startswith(b"HTTP/1.1 400")
        assert b"invalid_http" in said


def test_W2_a_body_above_the_cap_that_says_so(server: Server) -> None:
    said = server.raw(JSON + b"content-length: 4194305\r\n\r\n")
    assert said.startswith(b"HTTP/1.1 413")


def test_W2_a_body_above_the_cap_that_does_not_say_so(server: Server) -> None:
    before = server.memory("VmHWM")
    part = b"10000\r\n" + b"x" * 65_536 + b"\r\n"
    said = server.raw(JSON + b"transfer-encoding: chunked\r\n\r\n" + part * 65)
    assert said.startswith(b"HTTP/1.1 413")
    assert server.memory("VmHWM") - before < 32 * 2**20


def test_W2_a_length_that_is_none(server: Server) -> None:
    for length in (b"-1", b"1e9", b"9" * 40, b"5, 6"):
        said = server.raw(JSON + b"content-length: " + length + b"\r\n\r\n", shut=True)
        assert re.match(rb"HTTP/1.1 4(00|13)", said), said


INVALID: list[tuple[str, Any]] = [
    *(("max_tokens", value) for value in (-1, 0, 10**9, 1.5, "5", True, [])),
    *(("max_completion_tokens", value) for value in (-1, 0, 10**9, 1.5, "5")),
    *(("n", value) for value in (0, 2, 10**6, "1", True)),
    *(("temperature", value) for value in (-1, 2.1, "1", True, [1])),
    *(("top_p", value) for value in (0, -0.1, 1.1, "1")),
    *(("seed", value) for value in (1.5, "1", 2**63, True)),
    *(("stop", value) for value in (["a"] * 5, "x" * 10_000, [""], "", [1], {"a": 1}, 5)),
    *(("stream", value) for value in (1, "true", [])),
    *(("stream_options", value) for value in ({"include_usage": True}, [], {"x": 1})),
    *(("logprobs", value) for value in (True, 1)),
    *(("presence_penalty", 1), ("logit_bias", {"5": 1}), ("response_format", {"type": "json_object"})),
    *(("tools", [{"type": "function"}]), ("modalities", ["audio"]), ("top_logprobs", 5)),
    *(("messages", value) for value in ([], {}, "hi", None, [5], [[]])),
    *(("model", value) for value in (5, None, [])),
    *(("winnow", value) for value in (5, "hiprune", [], {"method": "hiprune"}, {"plan": 5, "x": 1})),
    *(("temprature", 1), ("stop_sequences", ["a"]), ("__class__", 1), ("", 1), ("a" * 1000, 1)),
]


@pytest.mark.parametrize(("name", "value"), INVALID)
def test_W3_a_field_out_of_bounds_is_named(server: Server, name: str, value: Any) -> None:
    answer = server.chat(**{"messages": [user(MOTORCYCLE)]} | {name: value})
    check_tells_nothing(answer)
    assert answer.status == 400
    assert answer.error["type"] == "invalid_request_error"
    assert re.sub(r"\[\d+\]$", "", answer.error["param"]) == name[:64]


def test_W3_an_unknown_field_is_told_with_the_one_that_is_near(server: Server) -> None:
    answer = server.chat(messages=[user(MOTORCYCLE)], temprature=1)
    assert code(answer) == (400, "unknown_parameter")
    assert "'temperature'" in answer.error["message"]


def test_W3_two_lengths_that_differ(server: Server) -> None:
    answer = server.chat(messages=[user(MOTORCYCLE)], max_tokens=5, max_completion_tokens=6)
    assert (answer.status, answer.error["param"]) == (400, "max_completion_tokens")


PARTS = [
    {"type": "input_audio", "input_audio": {"data": "", "format": "wav"}},
    {"type": "file", "file": {"filename": "x"}},
    {"type": "video_url", "video_url": {"url": "data:,"}, "fps": 2},
    {"type": "text"},
    {"type": "text", "text": 5},
    {"type": "text", "text": "a", "winnow": 1},
    {"type": "image_url", "image_url": "data:,"},
    {"type": "image_url", "image_url": {"url": "data:,", "detail": "huge"}},
    {"text": "a"},
    5,
    None,
    [],
]


@pytest.mark.parametrize("part", PARTS)
def test_W3_parts_that_are_not_known(server: Server, part: Any) -> None:
    answer = server.chat(messages=[{"role": "user", "content": [part]}])
    assert code(answer) == (400, "invalid_value")
    assert answer.error["param"].startswith("messages[0].content[0]")


PLANS = {
    "a file": "plan.json",
    "a file by its path": "/etc/passwd",
    "a file up the tree": "../../plan.json",
    "weights": "covipal:weights=x.safetensors",
    "weights of another": "hiprune:weights=x",
    "a calibration": "compresskv:calibration=x.json",
    "a method in a setting": "adakv:base=compresskv",
    "a method that is not allowed": "snapkv:keep=20%",
    "hidden in brackets": "divprune:keep=(]+snapkv:keep=[)",
    "an unknown method": "nonsense:keep=5",
    "no method": "",
    "no budget": "divprune:keep=0",
    "a budget that is none": "divprune:keep=nan",
    "below the range": "divprune:keep=-5",
    "more than is allowed": "divprune:keep=129",
    "more than is allowed, as a share": "divprune:keep=100%",
    "more than is allowed, without a method": "full",
    "an unknown setting": "divprune:kep=5",
    "a huge number": "divprune:keep=" + "9" * 400,
    "a huge seed": "divprune:keep=64 | seed=" + "9" * 300,
    "brackets": "divprune:keep=" + "[" * 200,
    "too long": "divprune:keep=64" + " " * 500,
    "too many": " + ".join(["divprune:keep=64"] * 5),
    "quotes": "divprune:keep='64'",
    "another schema": "v99|divprune:keep=64",
}


@pytest.mark.parametrize("name", PLANS)
def test_W3_plans_that_are_not_allowed(server: Server, name: str) -> None:
    answer = server.ask(MOTORCYCLE, drawn(54).image, winnow={"plan": PLANS[name]})
    assert code(answer) == (400, "invalid_plan")
    assert answer.error["param"] == "winnow.plan"


@pytest.mark.parametrize(
    "name", ["gpt-4o", "../../x", "/etc/passwd", "llava-hf/llava-1.5-7b-hf", "", "winnow-referencE"]
)
def test_W4_a_model_that_is_not_served_is_not_loaded(server: Server, name: str) -> None:
    start = time.monotonic()
    answer = server.chat(model=name, messages=[user(MOTORCYCLE)])
    assert code(answer) == (404, "model_not_found")
    assert time.monotonic() - start < 5


def routes() -> list[tuple[str, str]]:
    """Every route of the application, from its router."""
    from winnow.serve.app import make_app
    from winnow.serve.settings import Settings

    class Nothing:
        settings = Settings(name="x")

        def __getattr__(self, name: str) -> Any:
            async def route() -> None: ...

            return route

    found = make_app(Nothing(), [KEY]).inner.routes  # type: ignore[arg-type]
    return [(verb, own.path.replace("{name:path}", NAME)) for own in found for verb in own.methods]


def test_W9_every_route_but_health_asks_for_the_key(server: Server) -> None:
    assert len(routes()) == 5
    wrong = ["", "wrong", KEY[:-1], KEY + "x", KEY.upper(), "\u00e9" * 8, "x" * 20_000]
    for verb, path in [
        *routes(),
        ("GET", "/nothing"),
        ("GET", "/docs"),
        ("GET", "/openapi.json"),
        ("POST", "/health/"),
    ]:
        for key in wrong:
            answer = server.send(verb, path, b"{}" if verb == "POST" else None, key=key)
            if path == "/health":
                assert answer.status == 200
            else:
                assert code(answer) == (401, "invalid_api_key")
                assert answer.headers["www-authenticate"] == "Bearer"


def test_W9_other_ways_to_say_the_key_are_none(server: Server) -> None:
    for headers in ({"x_api_key": KEY}, {"authorization": f"Basic {KEY}"}, {"authorization": KEY}, {"cookie": KEY}):
        assert server.send("GET", "/v1/models", key="", **headers).status == 401
    assert server.send("GET", f"/v1/models?key={KEY}&api_key={KEY}", key="").status == 401


def test_W10_no_page_of_another_origin_reads_or_sends(server: Server) -> None:
    answer = server.ask(MOTORCYCLE, drawn(54).image)
    assert not [name for name in answer.headers if name.startswith("access-control")]
    asked = server.send("OPTIONS", CHAT, origin="http://evil.example", access_control_request_method="POST")
    assert asked.status == 405
    assert not [name for name in asked.headers if name.startswith("access-control")]
    # What a form of another page can send: no key, and no JSON.
    assert server.send("POST", CHAT, b"{}", key="", content_type="text/plain").status == 401


@pytest.mark.parametrize(
    "host", ["evil.example", "127.0.0.1.evil.example", "localhost@evil.example", "", "[::1", "a b"]
)
def test_W10_another_host_is_not_answered(server: Server, host: str) -> None:
    for path in ("/health", "/v1/models"):
        answer = server.send("GET", path, host=host)
        if host == "a b":
            assert answer.status in (400, 403)
        else:
            assert code(answer) == (403, "host_not_allowed")


def test_W10_names_of_this_machine_are_answered(server: Server) -> None:
    for host in ("localhost", f"localhost:{server.port}", "LOCALHOST", "127.0.0.1", "[::1]:80"):
        assert server.send("GET", "/v1/models", host=host).status == 200
    assert b"HTTP/1.1 400" in server.raw(b"GET /health HTTP/1.1\r\n\r\n", shut=True)


@pytest.mark.parametrize("name", ["../../x", "<img onerror=alert(1)>", "x" * 10_000, "a\x00b", "CON"])
def test_W11_there_are_no_names_of_files(server: Server, name: str) -> None:
    part = {"type": "image_url", "image_url": {"url": "data:image/png;base64,", "filename": name}}
    assert code(server.chat(messages=[{"role": "user", "content": [part]}])) == (400, "invalid_value")
    assert code(server.chat(messages=[user("hi")], user=name, filename=name)) == (400, "unknown_parameter")
    assert server.ask(MOTORCYCLE, drawn(54).image, user=name).text == "yes"


def test_W12_answers_are_data_and_not_pages(server: Server) -> None:
    for answer in (
        server.ask("<script>alert(1)</script> ![](http://evil.example/a.png)", drawn(54).image),
        server.chat(model="<script>alert(1)</script>", messages=[user("hi")]),
        server.send("GET", "/v1/models/<script>".replace("<", "%3C")),
    ):
        assert answer.headers["content-type"] == "application/json"
        assert answer.headers["content-security-policy"] == "default-src 'none'"
        assert answer.headers["x-content-type-options"] == "nosniff"
        assert b"alert" not in answer.body


def test_W13_the_server_writes_no_table(server: Server) -> None:
    """Only reports hold answers in tables; a text that begins with = comes back in JSON, and no file is written."""
    assert server.ask("=1+1", drawn(54).image).headers["content-type"] == "application/json"
    assert list(server.folder.iterdir()) == []


def test_W14_users_with_one_picture_get_their_own_settings(server: Server) -> None:
    keeps = [1, 16, 64, 128] * 4
    image = drawn(54).image

    def ask(keep: int) -> Any:
        return server.ask(MOTORCYCLE, image, winnow={"plan": f"hiprune:keep={keep}"}).json

    alone = {keep: ask(keep) for keep in set(keeps)}
    with ThreadPoolExecutor(len(keeps)) as pool:
        for keep, answer in zip(keeps, pool.map(ask, keeps), strict=True):
            assert answer["usage"]["winnow"]["kept"] == keep
            assert (answer["choices"], answer["usage"]) == (alone[keep]["choices"], alone[keep]["usage"])


def test_W15_errors_and_logs_hold_nothing_of_a_request(server: Server) -> None:
    word = "q7wordq7"
    before = len(server.log)
    ids = []
    for fields in (
        {"messages": [user(word, drawn(54).image)]},
        {"messages": [user(word + "</s>")]},
        {"messages": [user("hi", "data:image/png;base64," + "QUFB" * 9)]},
        {"messages": [user("hi")], "winnow": {"plan": word}},
    ):
        answer = server.chat(**fields)
        ids.append(answer.headers["x-request-id"])
        if answer.status != 200:
            check_tells_nothing(answer)
    server.send("GET", f"/{word}", key=word)
    time.sleep(0.2)
    log = "\n".join(server.log[before:])
    assert all(number in log for number in ids)
    assert word not in log
    assert KEY not in "\n".join(server.log)
    assert not re.search(r"Traceback|/\w+/|127\.0\.0\.1|QUFB", log)
