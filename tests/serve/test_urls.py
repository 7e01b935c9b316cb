"""Nothing is fetched and nothing is opened: rows U1 to U7."""

from __future__ import annotations

import json
import socket
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import media_assets as assets
import pytest
import transformers.image_utils

from serve.process import MOTORCYCLE, Server, check_tells_nothing, drawn, url
from winnow.core.plan import Plan
from winnow.serve.errors import ApiError
from winnow.serve.settings import Settings
from winnow.serve.start import make_service


@pytest.fixture
def canary() -> Iterator[tuple[int, list[bytes]]]:
    """A port that notes who connects."""
    seen: list[bytes] = []
    with socket.create_server(("127.0.0.1", 0)) as listener:

        def accept() -> None:
            while True:
                try:
                    connection, _ = listener.accept()
                except OSError:
                    return
                with connection:
                    seen.append(b"connected")

        threading.Thread(target=accept, daemon=True).start()
        yield listener.getsockname()[1], seen


def check_refused(server: Server, given: str) -> None:
    answer = server.ask(MOTORCYCLE, given)
    assert answer.status == 400
    assert answer.error["code"] == "invalid_image_url"
    assert "fetches and opens nothing" in answer.error["message"]
    check_tells_nothing(answer)


def test_U1_local_files_and_other_schemes(server: Server, tmp_path: Path) -> None:
    picture = tmp_path / "good.png"
    picture.write_bytes(assets.encode(drawn(54).image, "PNG"))  # it would be answered, were it opened
    schemes = ("ftp://a/b.png", "gopher://a", "javascript:alert(1)", "C:\\good.png", "\\\\host\\share\\a.png", "")
    for given in (str(picture), picture.as_uri(), "/etc/passwd", "file:///etc/passwd", *schemes):
        check_refused(server, given)


HOSTS = [
    "127.0.0.1",
    "localhost",
    "0.0.0.0",  # noqa: S104
    "[::1]",
    "[::ffff:127.0.0.1]",
    "169.254.169.254",
    "10.0.0.1",
    "172.16.0.1",
    "192.168.0.1",
    "[fc00::1]",
    "[fe80::1]",
    "100.64.0.1",
]


def test_U2_inner_hosts(server: Server, canary: tuple[int, list[bytes]]) -> None:
    port, seen = canary
    for host in HOSTS:
        check_refused(server, f"http://{host}:{port}/a.png")
    assert seen == []


def test_U3_hosts_in_disguise(server: Server, canary: tuple[int, list[bytes]]) -> None:
    port, seen = canary
    for host in (
        "2130706433",
        "0177.0.0.1",
        "0x7f000001",
        "localhost.",
        "ⓛocalhost",
        "good@127.0.0.1",
        "good\\@127.0.0.1",
    ):
        check_refused(server, f"http://{host}:{port}/a.png")
    assert seen == []


@pytest.mark.parametrize("row", ["U4 redirects", "U5 rebinding", "U6 bodies without end"])
def test_U4_U5_U6_what_a_far_host_could_do_needs_a_connection(
    server: Server, canary: tuple[int, list[bytes]], row: str
) -> None:
    """Redirects, names that change their address and endless bodies all begin with a connection; there is none."""
    port, seen = canary
    for scheme in ("http", "https", "HTTP"):
        check_refused(server, f"{scheme}://127.0.0.1:{port}/{row.split()[0]}.png")
    assert seen == []


def test_U1_U7_reading_a_request_opens_nothing_and_hands_no_text_to_a_processor(
    reference: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Here the reader runs in the tests' own process, where every file and connection that Python opens is seen."""
    service = make_service(*reference, Plan.of("hiprune:keep=64"), Settings(name="m", methods=("hiprune",)))
    good, bad = (request(given) for given in (url(drawn(54).image), "file:///etc/passwd"))
    service.reader.read(bytearray(good), print, "1")  # what is imported late is imported now

    def forbidden(*args: object, **options: object) -> None:
        raise AssertionError("load_image was called")

    monkeypatch.setattr(transformers.image_utils, "load_image", forbidden)
    watching, seen = threading.get_ident(), []

    def watch(event: str, args: tuple[object, ...]) -> None:
        if event in ("open", "socket.connect", "socket.getaddrinfo") and threading.get_ident() == watching:
            seen.append((event, args))

    sys.addaudithook(watch)
    try:
        _, job = service.reader.read(bytearray(good), print, "2")
        with pytest.raises(ApiError) as raised:
            service.reader.read(bytearray(bad), print, "3")
        found = list(seen)
        with open(__file__, "rb"):  # the hook does see
            pass
        assert len(seen) == len(found) + 1
    finally:
        watching = 0  # a hook stays for good: this one sleeps
    assert job.sizes == (256,)
    assert raised.value.code == "invalid_image_url"
    assert found == []


def request(given: str) -> bytes:
    part = {"type": "image_url", "image_url": {"url": given}}
    return json.dumps({"model": "m", "messages": [{"role": "user", "content": [part]}]}).encode()
