"""Answers in OpenAI's shape: one object, or a stream of chunks as server-sent events."""

from __future__ import annotations

import json
import time
from dataclasses import dataclass, field
from typing import Any

from winnow.serve.errors import ApiError
from winnow.serve.job import Done, Started

END = b"data: [DONE]\n\n"


@dataclass(frozen=True)
class Reply:
    """What all parts of one answer share.

    Args:
        number: of the request.
        include_usage: whether chunks say `usage`, as null, and the last one in full.
    """

    number: str
    model: str
    include_usage: bool = False
    created: int = field(default_factory=lambda: int(time.time()))

    def whole(self, text: str, started: Started, done: Done) -> dict[str, Any]:
        """The answer as one object."""
        message = {"role": "assistant", "content": text, "refusal": None}
        choice = {"index": 0, "message": message, "logprobs": None, "finish_reason": done.reason}
        return {**self._head("chat.completion"), "choices": [choice], "usage": usage(started, done)}

    def chunk(self, delta: dict[str, Any], reason: str | None = None) -> bytes:
        """One event of a stream."""
        choice = {"index": 0, "delta": delta, "logprobs": None, "finish_reason": reason}
        null = {"usage": None} if self.include_usage else {}
        return event({**self._head("chat.completion.chunk"), "choices": [choice], **null})

    def last(self, started: Started, done: Done) -> bytes:
        """The event that holds the usage."""
        return event({**self._head("chat.completion.chunk"), "choices": [], "usage": usage(started, done)})

    def _head(self, kind: str) -> dict[str, Any]:
        return {"id": f"chatcmpl-{self.number}", "object": kind, "created": self.created, "model": self.model}


def usage(started: Started, done: Done) -> dict[str, Any]:
    """Tokens that the model got and wrote, and what compression left of the pictures."""
    return {
        "prompt_tokens": started.prompt,
        "completion_tokens": done.tokens,
        "total_tokens": started.prompt + done.tokens,
        "winnow": {"given": started.given, "kept": started.kept, "plan": started.plan},
    }


def event(value: dict[str, Any]) -> bytes:
    """A server-sent event that holds JSON."""
    return b"data: " + json.dumps(value, ensure_ascii=False).encode() + b"\n\n"


def failure(error: ApiError) -> bytes:
    """The event that ends a stream in which something failed."""
    return event(error.body())


def models(name: str, created: int) -> dict[str, Any]:
    """The list of models; there is one."""
    return {"object": "list", "data": [model(name, created)]}


def model(name: str, created: int) -> dict[str, Any]:
    return {"id": name, "object": "model", "created": created, "owned_by": "winnow"}
