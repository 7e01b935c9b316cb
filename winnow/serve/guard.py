"""What stands before all routes: Host, key, size of the queue, time, and one shape for every error."""

from __future__ import annotations

import asyncio
import hashlib
import hmac
import logging
import re
import secrets
from collections.abc import Callable, Sequence
from typing import Any

from starlette.responses import JSONResponse

from winnow.serve.errors import ApiError, internal, invalid, where
from winnow.serve.settings import Settings

log = logging.getLogger("winnow.serve")
Header = tuple[bytes, bytes]
OPEN = ("/health",)  # the only route that asks for no key
_HOST = re.compile(r"(\[[0-9A-Fa-f:.]+\]|[A-Za-z0-9.-]+)(:\d{1,5})?")
HEADERS: list[Header] = [
    (b"x-content-type-options", b"nosniff"),
    (b"content-security-policy", b"default-src 'none'"),
    (b"cache-control", b"no-store"),
]


class Guard:
    """An ASGI application around another: checks each request, and answers for what fails inside.

    Args:
        keys: of which a client must have one.
        answered: is told the status of each answer; 0 where the client left or the answer was cut.
    """

    def __init__(
        self, inner: Any, settings: Settings, keys: Sequence[str], answered: Callable[[int], None] = lambda status: None
    ) -> None:
        self.inner, self.settings, self.answered = inner, settings, answered
        self._keys = [_digest(key.encode()) for key in keys]

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] != "http":
            await self.inner(scope, receive, send)
            return
        number = secrets.token_hex(8)
        scope.setdefault("state", {})["number"] = number
        status = 0

        async def sent(message: Any) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                extra = [*self.headers(scope["path"]), (b"x-request-id", number.encode())]
                message = {**message, "headers": [*message.get("headers", []), *extra]}
            await send(message)

        problem: ApiError | None = None
        try:
            self.check(scope)
            async with asyncio.timeout(self.settings.seconds):
                await self.inner(scope, receive, sent)
        except ApiError as error:
            problem = error
        except TimeoutError:
            text = f"The request took more than {self.settings.seconds:g} seconds."
            problem = ApiError(text, status=503, kind="server_error", code="timeout")
        except Exception as error:
            log.error("%s %s", number, where(error))
            problem = internal()
        if problem is not None and not status:
            await answer_of(problem)(scope, receive, sent)
        self.answered(status)
        log.info("%s %s", number, status or "left")

    def is_open(self, path: str) -> bool:
        """Whether a path asks for no key."""
        return path in OPEN

    def headers(self, path: str) -> list[Header]:
        """What is added to each answer of a path."""
        return HEADERS

    def check(self, scope: Any) -> None:
        """Raise ApiError for a request that goes no further."""
        hosts = [value for name, value in scope["headers"] if name == b"host"]
        if len(hosts) != 1 or not self._is_host(hosts[0].decode("latin-1")):
            raise ApiError("This Host is not served here.", status=403, code="host_not_allowed")
        if not self.is_open(scope["path"]) and not self._has_key(scope["headers"]):
            text = "Give the key of this server as 'Authorization: Bearer …'."
            raise ApiError(text, status=401, kind="authentication_error", code="invalid_api_key")

    def _is_host(self, value: str) -> bool:
        found = _HOST.fullmatch(value)
        return found is not None and found[1].strip("[]").lower() in self.settings.hosts

    def _has_key(self, headers: Any) -> bool:
        given = [value for name, value in headers if name == b"authorization"]
        if len(given) != 1 or given[0][:7].lower() != b"bearer ":
            return False
        own = _digest(given[0][7:].strip())
        # All keys are compared, each in constant time.
        return sum(hmac.compare_digest(own, key) for key in self._keys) > 0


def _digest(key: bytes) -> bytes:
    return hashlib.sha256(key).digest()


def answer_of(error: ApiError) -> JSONResponse:
    """An error as a complete answer."""
    headers = {} if error.retry is None else {"retry-after": str(error.retry)}
    if error.status == 401:
        headers["www-authenticate"] = "Bearer"
    return JSONResponse(error.body(), error.status, headers)


def of_status(status: int) -> ApiError:
    """What is said for a path or a verb that is not there."""
    if status == 404:
        return invalid("There is no such path.", code="not_found", status=404)
    if status == 405:
        return invalid("This path does not take this method.", code="method_not_allowed", status=405)
    return invalid("The request is not valid.", status=status)
