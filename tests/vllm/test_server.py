"""`winnow serve --engine vllm`: a real server process on loopback, asked by the official `openai` client."""

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
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from asking import TOKENS, Case, Library, picture

STARTS = 240  # seconds that a server may take
KEY = "key-of-the-tests"
SHOWN = (1, 112, 112)
QUESTION = "what is in the picture ?"


@pytest.fixture(scope="module")
def client(vllm: Any, checkpoint: Callable[[str], str], tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    """A client of a server that runs until the tests of this file are done."""
    import openai

    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    log = tmp_path_factory.mktemp("server") / "log.txt"
    command = [
        *(sys.executable, "-P", "-m", "winnow.cli", "serve", "--engine", "vllm", "--port", str(port)),
        *("--model", checkpoint("llava"), "--name", "tiny", "--method", "fastervlm", "--keep", "16"),
        *("--allow", "divprune", "--max-keep", "75%", "--max-pictures", "2", "--max-context", "1024", "--batch", "4"),
        *("--dtype", "float32", "--", "--enforce-eager", "--block-size", "32", "--enable-prompt-tokens-details"),
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


def ask(client: Any, words: str = QUESTION, pictures: int = 1, winnow: Any = None) -> Any:
    data = io.BytesIO()
    picture(*SHOWN).save(data, "PNG")
    url = "data:image/png;base64," + base64.b64encode(data.getvalue()).decode()
    content = [{"type": "image_url", "image_url": {"url": url}}] * pictures + [{"type": "text", "text": words}]
    body = {} if winnow is None else {"mm_processor_kwargs": {"winnow": winnow}}
    return client.chat.completions.create(
        model="tiny",
        messages=[{"role": "user", "content": content}],
        max_tokens=TOKENS,
        temperature=0,
        extra_body=body | {"ignore_eos": True, "return_token_ids": True},
    )


def test_requests_choose_and_usage_counts_what_was_kept(client: Any) -> None:
    text = ask(client).usage.prompt_tokens - 16
    assert ask(client, winnow={"keep": 40}).usage.prompt_tokens == text + 40
    assert ask(client, winnow={"plan": "divprune", "keep": "25%"}).usage.prompt_tokens == text + 16
    assert ask(client, pictures=2).usage.prompt_tokens == text + 32


def test_the_answer_is_that_of_the_library(client: Any) -> None:
    library = Library("llava")
    for slug in ("fastervlm", "divprune"):
        choice = ask(client, winnow={"plan": slug, "keep": 16}).choices[0]
        said, _ = library.answer(Case(f"@ {QUESTION}", (SHOWN,), f"{slug}:keep=16"))
        assert choice.token_ids == said


def test_another_question_about_the_picture_reuses_it(client: Any) -> None:
    first = ask(client, winnow={"keep": 48})
    other = ask(client, "is a red dog left of the picture ?", winnow={"keep": 48})
    assert first.usage.prompt_tokens_details is None or not first.usage.prompt_tokens_details.cached_tokens
    assert other.usage.prompt_tokens_details.cached_tokens == 32
    fewer = ask(client, "is a red dog left of the picture ?", winnow={"keep": 47})
    assert fewer.usage.prompt_tokens_details is None or not fewer.usage.prompt_tokens_details.cached_tokens


def test_a_key_is_asked_for(client: Any) -> None:
    import openai

    with pytest.raises(openai.AuthenticationError):
        ask(client.with_options(api_key="another-key"))


@pytest.mark.parametrize(
    ("winnow", "told"),
    [
        (False, "this server allows 1 to 75%"),
        ({"keep": "100%"}, "this server allows 1 to 75%"),
        ({"plan": "covipal:weights=/etc/passwd"}, "is not offered by this server"),
        ({"keep": "all"}, "cannot be read"),
    ],
)
def test_what_the_operator_does_not_allow_is_a_bad_request(client: Any, winnow: Any, told: str) -> None:
    import openai

    with pytest.raises(openai.BadRequestError, match=told):
        ask(client, winnow=winnow)
    assert ask(client).usage.completion_tokens == TOKENS  # the server lives
