"""What is asked: scenes of winnow's world, each once, under plans said as the server understands them."""

from __future__ import annotations

import base64
import io
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from winnow.core.errors import WinnowError
from winnow.core.plan import FULL
from winnow.world import scene

SERVED = "server"
"""In the place of a plan: the request brings none, and the server's own holds."""
SPLIT = "test"
_BUDGET = re.compile(r"[0-9.]+%?")
FAR = 2**40  # seeds from here are for scenes of which the first has no question


@dataclass(frozen=True)
class Question:
    """A scene as a data: URL, a question about it, and the right answer."""

    picture: str
    text: str
    truth: str


def question(seed: int, size: int) -> Question:
    """One question about the scene of a seed."""
    drawn = scene(seed, size, SPLIT)
    while not drawn.questions:
        seed += FAR
        drawn = scene(seed, size, SPLIT)
    chosen = drawn.questions[seed % len(drawn.questions)]
    file = io.BytesIO()
    drawn.image.save(file, "PNG", compress_level=1)
    url = "data:image/png;base64," + base64.b64encode(file.getvalue()).decode()
    return Question(url, chosen.text, chosen.answer)


@dataclass(frozen=True)
class Asking:
    """How requests are written.

    Attributes:
        model: its name on the server.
        server: winnow, vllm, or any: a server to which no plan can be said.
        length: tokens of an answer at most; with `to_the_end`, which only vLLM knows, exactly.
    """

    model: str
    server: str
    length: int
    to_the_end: bool = False

    def body(self, asked: Question, plan: str) -> bytes:
        """A request for a stream."""
        content = [
            {"type": "image_url", "image_url": {"url": asked.picture}},
            {"type": "text", "text": asked.text},
        ]
        fields: dict[str, Any] = {
            "model": self.model,
            "messages": [{"role": "user", "content": content}],
            "max_tokens": self.length,
            "temperature": 0,
            "stream": True,
            "stream_options": {"include_usage": True},
        }
        return json.dumps(fields | self._end() | self._said(plan)).encode()

    def check(self, plans: Sequence[str]) -> None:
        """Refuse what cannot be said to this server."""
        if self.server == "any" and (named := [plan for plan in plans if plan != SERVED]):
            raise WinnowError(
                f"--plan {named[0]!r}: this server is neither winnow's nor vLLM, so no plan can be said to it; ask it "
                f"under --plan {SERVED}."
            )
        if self.to_the_end and self.server != "vllm":
            raise WinnowError("--ignore-eos is a field of vLLM's requests, and this server is not vLLM; leave it out.")

    def _end(self) -> dict[str, Any]:
        return {"ignore_eos": True} if self.to_the_end else {}

    def _said(self, plan: str) -> dict[str, Any]:
        if plan == SERVED:
            return {}
        if self.server == "winnow":
            return {"winnow": {"plan": plan}}
        return {"mm_processor_kwargs": {"winnow": False if plan == FULL else _of_vllm(plan)}}


def _of_vllm(plan: str) -> dict[str, str]:
    """A plan as requests to vLLM say it: one that the operator named, which may be at another budget."""
    slug, _, keep = plan.partition(":keep=")
    return {"plan": slug, "keep": keep} if _BUDGET.fullmatch(keep) else {"plan": plan}


def server_of(model: Mapping[str, Any]) -> str:
    """Which server it is, by what it says of a model."""
    owner = model.get("owned_by")
    return owner if owner in ("winnow", "vllm") else "any"
