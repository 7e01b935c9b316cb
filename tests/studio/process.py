"""A real process of `winnow studio`, and what its page says to it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from serve.process import Answer, Server

STORE, BROKEN = "runs.sqlite", "broken.sqlite"


class StudioServer(Server):
    """A studio on a free port, with the key of its printed address."""

    words = ("studio", "--port", "0")
    greeting = "winnow studio asks the bundled reference model. Open http://127.0.0.1:"

    def __init__(self, folder: Path, *options: str) -> None:
        super().__init__(folder, *options)
        self.url = self.said.split()[-1]
        self.key = self.url.rpartition("#")[2]

    def call(self, path: str, timeout: float = 60, **fields: Any) -> Answer:
        """A POST of the page."""
        return self.send("POST", f"/api/{path}", json.dumps(fields).encode(), timeout)

    def ask(self, question: str, picture: str, plan: str = "full", **fields: Any) -> Answer:  # type: ignore[override]
        """One question, timed once."""
        return self.call("answer", picture=picture, question=question, plan=plan, **{"runs": 1} | fields)
