"""Ten thousand requests of all kinds that are wrong, mixed with good ones, from a seed."""

from __future__ import annotations

import json
import random
import socket
from collections.abc import Callable
from functools import cache
from typing import Any

import media_assets as assets
from PIL import Image

from serve.process import KEY, MOTORCYCLE, NAME, Server, drawn, url, user
from serve.test_requests import BODIES, INVALID, JSON, PARTS, PLANS

Kind = Callable[[Server, random.Random], int]
PATHS = ("/", "/v1", "/v1/completions", "/v1/models/../../etc/passwd", "/%00", "/v1/models/%2e%2e", "/" + "a" * 5000)


@cache
def pictures() -> list[str]:
    """URLs of pictures that are refused or odd."""
    scene = assets.encode(drawn(54).image, "PNG")
    data = [b"", b"text", scene[:500], assets.png_bomb(9_400), *assets.foreign_files().values()]
    data += [*assets.huge_headers(16_000).values(), assets.gif(32, 32, frames=50)]
    data += [assets.encode(Image.new("RGB", size), "PNG") for size in ((1, 1), (1, 300), (300, 1))]
    texts = ["", "data:", "data:,", "file:///etc/passwd", "http://127.0.0.1:1/a.png", "data:image/png;base64,***"]
    return [url(own) for own in data] + texts


def body(server: Server, draw: random.Random) -> int:
    return server.send("POST", "/v1/chat/completions", draw.choice(list(BODIES.values()))).status


def mangled(server: Server, draw: random.Random) -> int:
    """A good request with some of its bytes changed."""
    data = bytearray(json.dumps({"model": NAME, "messages": [user(MOTORCYCLE)], "max_tokens": 4}).encode())
    for _ in range(draw.randint(1, 6)):
        data[draw.randrange(len(data))] = draw.randrange(256)
    return server.send("POST", "/v1/chat/completions", bytes(data)).status


def field(server: Server, draw: random.Random) -> int:
    name, value = draw.choice(INVALID)
    return server.chat(**{"messages": [user(MOTORCYCLE)]} | {name: value}).status


def part(server: Server, draw: random.Random) -> int:
    return server.chat(messages=[{"role": "user", "content": [draw.choice(PARTS)]}]).status


def plan(server: Server, draw: random.Random) -> int:
    return server.chat(messages=[user(MOTORCYCLE)], winnow={"plan": draw.choice(list(PLANS.values()))}).status


def picture(server: Server, draw: random.Random) -> int:
    return server.ask(MOTORCYCLE, draw.choice(pictures()), max_tokens=2).status


def noise(server: Server, draw: random.Random) -> int:
    """A picture with some of its bytes changed."""
    data = bytearray(assets.encoded(draw.choice(assets.FORMATS)))
    for _ in range(draw.randint(1, 8)):
        data[draw.randrange(len(data))] = draw.randrange(256)
    return server.ask(MOTORCYCLE, bytes(data), max_tokens=2).status


def path(server: Server, draw: random.Random) -> int:
    return server.send(draw.choice(("GET", "POST", "PUT", "DELETE")), draw.choice(PATHS)).status


def stranger(server: Server, draw: random.Random) -> int:
    return server.send("GET", "/v1/models", key=draw.choice(("", "wrong", KEY[:-1]))).status


def other_host(server: Server, draw: random.Random) -> int:
    return server.send("GET", "/v1/models", host="evil.example").status


def junk(server: Server, draw: random.Random) -> int:
    said = server.raw(draw.randbytes(draw.randint(1, 2000)), shut=True)
    return int(said.split(b" ")[1]) if said.startswith(b"HTTP/1.1 ") else 0


def leaver(server: Server, draw: random.Random) -> int:
    """A client that leaves in the middle of its body, or of its answer."""
    data = json.dumps({"model": NAME, "messages": [user(MOTORCYCLE)], "stream": True}).encode()
    with socket.create_connection(("127.0.0.1", server.port), timeout=10) as connection:
        connection.sendall(JSON + b"content-length: %d\r\n\r\n" % len(data))
        connection.sendall(data[: draw.choice((0, len(data) // 2, len(data)))])
    return 0


KINDS: tuple[Kind, ...] = (
    body, mangled, field, part, plan, picture, noise, path, stranger, other_host, junk, leaver,
)  # fmt: skip


def good(server: Server, draw: random.Random) -> Any:
    """What a good request is answered."""
    answer = server.ask(MOTORCYCLE, drawn(54).image)
    return answer.status, answer.text
