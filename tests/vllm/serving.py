"""A real server process on loopback, `winnow serve --engine vllm`, and what it is asked."""

from __future__ import annotations

import base64
import contextlib
import io
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
from asking import TOKENS
from PIL import Image

STARTS = 240  # seconds that a server may take
KEY = "key-of-the-tests"


@contextlib.contextmanager
def served(model: str, options: Sequence[str], folder: Path) -> Iterator[Any]:
    """A client of a server on a checkpoint, which ends with the context, and cleanly."""
    import openai

    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    log = folder / "log.txt"
    command = [
        *(sys.executable, "-P", "-m", "winnow.cli", "serve", "--engine", "vllm", "--port", str(port)),
        *("--model", model, "--name", "tiny", "--max-context", "1024", "--batch", "4", "--dtype", "float32", *options),
        *("--", "--enforce-eager", "--block-size", "32", "--enable-prompt-tokens-details"),
    ]
    environment = {name: x for name, x in os.environ.items() if name != "VLLM_ENABLE_V1_MULTIPROCESSING"}
    environment |= {"WINNOW_API_KEY": KEY}
    with log.open("wb") as out:
        process = subprocess.Popen(command, stdout=out, stderr=out, env=environment, start_new_session=True)
    try:
        _wait_for(f"http://127.0.0.1:{port}/health", process, log)
        yield openai.OpenAI(base_url=f"http://127.0.0.1:{port}/v1", api_key=KEY, timeout=120, max_retries=0)
    finally:
        process.send_signal(signal.SIGTERM)
        try:
            assert process.wait(30) == 0, log.read_text(errors="replace")[-3000:]
        finally:
            with contextlib.suppress(ProcessLookupError):  # an engine outlives a server that does not end by itself
                os.killpg(process.pid, signal.SIGKILL)
            process.wait(30)


def _wait_for(url: str, process: subprocess.Popen[bytes], log: Path) -> None:
    end = time.monotonic() + STARTS
    while time.monotonic() < end:
        if process.poll() is not None:
            pytest.fail(f"the server ended: {log.read_text(errors='replace')[-3000:]}")
        try:
            with urllib.request.urlopen(url, timeout=2):  # noqa: S310 - on loopback
                return
        except (urllib.error.URLError, OSError):
            time.sleep(0.5)
    pytest.fail(f"the server did not start in {STARTS} s: {log.read_text(errors='replace')[-3000:]}")


def encoded(image: Image.Image) -> str:
    data = io.BytesIO()
    image.save(data, "PNG")
    return base64.b64encode(data.getvalue()).decode()


def say(client: Any, shown: list[dict[str, Any]], words: str, winnow: Any) -> Any:
    content = [*shown, {"type": "text", "text": words}]
    body = {} if winnow is None else {"mm_processor_kwargs": {"winnow": winnow}}
    return client.chat.completions.create(
        model="tiny",
        messages=[{"role": "user", "content": content}],
        max_tokens=TOKENS,
        temperature=0,
        extra_body=body | {"ignore_eos": True, "return_token_ids": True},
    )
