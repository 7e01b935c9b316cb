"""Errors in OpenAI's shape, in winnow's own words: no path, address, traceback or text of another library."""

from __future__ import annotations

import re
from typing import Any

from winnow.core.errors import WinnowError

INVALID = "invalid_request_error"
LONGEST = 600  # characters of a message
_PATH = re.compile(r"(?<![\w.:])(~?/|[A-Za-z]:\\|\\\\)[\w.@-]+([/\\]|\.\w)|site-packages|\.py\b")


class ApiError(Exception):
    """What a client is told.

    Attributes:
        status: of HTTP.
        kind, param, code: `type`, `param` and `code` of OpenAI's error object.
        retry: seconds after which the client may come back.
    """

    def __init__(
        self,
        message: str,
        *,
        status: int = 400,
        kind: str = INVALID,
        param: str | None = None,
        code: str | None = None,
        retry: int | None = None,
    ) -> None:
        super().__init__(message)
        self.message, self.status, self.kind, self.param, self.code = message, status, kind, param, code
        self.retry = retry

    def body(self) -> dict[str, Any]:
        """The JSON of the answer."""
        message = self.message if len(self.message) <= LONGEST else self.message[: LONGEST - 1] + "…"
        said = message.encode("utf-8", "replace").decode("utf-8")  # a request can hold half a surrogate pair
        return {"error": {"message": said, "type": self.kind, "param": self.param, "code": self.code}}


def invalid(message: str, param: str | None = None, code: str | None = None, status: int = 400) -> ApiError:
    """A mistake of the request."""
    return ApiError(message, status=status, param=param, code=code)


def told(error: WinnowError) -> str:
    """The text of a mistake, unless it names a file of the server's."""
    text = " ".join(str(error).split())
    return "This request cannot be answered with this plan on this model." if _PATH.search(text) else text


def internal() -> ApiError:
    """What a client is told of a fault of the server; the log has the rest."""
    return ApiError("The server failed to answer this request.", status=500, kind="server_error", code="internal_error")


def no_memory() -> ApiError:
    text = "Memory ran out for this request; send a smaller picture, or ask for fewer tokens."
    return ApiError(text, status=503, kind="server_error", code="out_of_memory", retry=1)


def stopping() -> ApiError:
    return ApiError("The server is stopping.", status=503, kind="server_error", code="stopping", retry=5)


def busy(what: str) -> ApiError:
    return ApiError(f"{what}; try again.", status=429, kind="rate_limit_error", code="busy", retry=1)


def where(error: BaseException) -> str:
    """A fault for the log: its class, and the functions of winnow that it came through. No text, no path."""
    steps = []
    at = error.__traceback__
    while at is not None:
        module = at.tb_frame.f_globals.get("__name__", "")
        if module.startswith("winnow"):
            steps.append(f"{module}.{at.tb_frame.f_code.co_name}:{at.tb_lineno}")
        at = at.tb_next
    return f"{type(error).__name__} in {' > '.join(steps[-4:]) or 'another library'}"
