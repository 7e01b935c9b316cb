"""The body of a request: read bit by bit within its bounds, and parsed as strict JSON."""

from __future__ import annotations

import asyncio
import contextlib
import json
from collections.abc import Iterator
from typing import Any

from starlette.requests import Request

from winnow.serve.errors import ApiError, busy, invalid
from winnow.serve.settings import Settings


class Gone(Exception):
    """The client left."""


class Buffered:
    """Bytes of all bodies that are being read, so that many clients cannot fill the memory together."""

    def __init__(self, most: int) -> None:
        self.most, self.held = most, 0

    @contextlib.contextmanager
    def share(self) -> Iterator[Share]:
        """The bytes of one request, counted until the context is left."""
        own = Share(self)
        try:
            yield own
        finally:
            self.held -= own.held


class Share:
    """What one request holds of the buffered bytes."""

    def __init__(self, whole: Buffered) -> None:
        self.whole, self.held = whole, 0

    def take(self, count: int) -> None:
        if self.whole.held + count > self.whole.most:
            raise busy("The server is reading as many bytes as it may")
        self.whole.held += count
        self.held += count


async def read_body(request: Request, settings: Settings, share: Share) -> bytearray:
    """The body.

    Raises:
        ApiError: of the wrong type (415), too long (413), too slow (408), or there is no room (429).
        Gone: the client left before its end.
    """
    _check_head(request, settings)
    try:
        async with asyncio.timeout(settings.body_seconds):
            return await _collected(request, settings, share)
    except TimeoutError:
        text = f"The body did not come within {settings.body_seconds:g} seconds."
    raise invalid(text, code="request_timeout", status=408)


async def _collected(request: Request, settings: Settings, share: Share) -> bytearray:
    body = bytearray()
    while True:
        message = await request.receive()
        if message["type"] == "http.disconnect":
            raise Gone
        part = message.get("body", b"")
        if len(body) + len(part) > settings.body:
            raise _too_long(settings)
        share.take(len(part))
        body += part
        if not message.get("more_body", False):
            return body


def _check_head(request: Request, settings: Settings) -> None:
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind != "application/json":
        raise invalid("The content type must be application/json.", code="unsupported_media_type", status=415)
    if request.headers.get("content-encoding", "identity").strip().lower() != "identity":
        raise invalid("The body must not be compressed.", code="unsupported_media_type", status=415)
    length = request.headers.get("content-length", "0")
    if length.isdecimal() and (len(length) > 15 or int(length) > settings.body):
        raise _too_long(settings)


def _too_long(settings: Settings) -> ApiError:
    return invalid(f"The body has more than {settings.body} bytes.", code="request_too_large", status=413)


def parse_json(body: bytes | bytearray, values: int) -> dict[str, Any]:
    """The object that a body holds.

    Refused beside what is no JSON: NaN and infinities, numbers beyond a float, a key that is given twice.

    Args:
        values: commas and brackets that it may have.
    """
    if sum(body.count(mark) for mark in (b",", b"[", b"{")) > values:
        raise invalid(f"The body holds more than {values} values.", code="request_too_large", status=413)
    problem = "it is not valid JSON in UTF-8"
    try:
        found = json.loads(
            body.decode("utf-8"), object_pairs_hook=_unique, parse_constant=_refuse_constant, parse_float=_finite
        )
        if isinstance(found, dict):
            return found
        problem = "it must be a JSON object"
    except _Refused as refused:
        problem = str(refused)
    except RecursionError:
        problem = "it is nested too deeply"
    except (ValueError, MemoryError):  # a number of 5,000 digits is a ValueError too
        pass
    raise invalid(f"The body cannot be read: {problem}.", code="invalid_json")


class _Refused(Exception):
    """JSON that Python would take."""


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    made = dict(pairs)
    if len(made) < len(pairs):
        raise _Refused("a key is given twice")
    return made


def _refuse_constant(_: str) -> Any:
    raise _Refused("NaN and Infinity are not JSON")


def _finite(text: str) -> float:
    value = float(text)
    if value in (float("inf"), float("-inf")):
        raise _Refused("a number is too large")
    return value
