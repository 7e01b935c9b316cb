"""A `winnow serve` of the bench's own, on a free port, with a key that nobody else knows."""

from __future__ import annotations

import os
import secrets
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import IO

import winnow
from winnow.core.errors import WinnowError

GRACE = 10.0  # seconds until a server that was told to end is killed
TAIL = 2000  # characters of its log that are searched for the cause


@contextmanager
def own_server(options: Sequence[str], env: str) -> Iterator[tuple[str, str]]:
    """Start `winnow serve` with these options; it ends with the context, or with this process.

    Args:
        env: the variable in which the server looks for its key.

    Yields:
        Its address and its key.

    Raises:
        WinnowError: it did not start; what it said is part of the message.
    """
    key = secrets.token_urlsafe(24)
    path = os.pathsep.join(filter(None, [str(Path(winnow.__file__).parents[1]), os.environ.get("PYTHONPATH")]))
    command = [sys.executable, "-P", "-m", "winnow.cli_child", "serve", "--port", "0", "--grace", "1", *options]
    with tempfile.TemporaryFile("w+", encoding="utf-8", errors="replace") as log:
        process = subprocess.Popen(  # noqa: S603 - winnow itself
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=log, text=True,
            env=os.environ | {env: key, "PYTHONPATH": path},
            start_new_session=True,  # Ctrl-C is for this process, which ends the other one
        )  # fmt: skip
        try:
            yield _address(process, log), key
        finally:
            _end(process)


def _address(process: subprocess.Popen[str], log: IO[str]) -> str:
    said = process.stdout.readline() if process.stdout is not None else ""
    found = said.split()[-1:] or [""]
    if found[0].startswith("http"):
        return found[0]
    code = process.wait()
    log.seek(0)
    lines = [line for line in log.read()[-TAIL:].splitlines() if line.strip()]
    cause = lines[-1].removeprefix("winnow: ") if lines else f"exit code {code}"
    raise WinnowError(f"winnow serve did not start: {cause}")


def _end(process: subprocess.Popen[str]) -> None:
    process.terminate()
    try:
        process.wait(GRACE)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
    for pipe in (process.stdin, process.stdout):
        if pipe is not None:
            pipe.close()
