"""OpenAI's own client against a real server process."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import openai
import pytest

from serve.process import KEY, MOTORCYCLE, NAME, ROOT, Server, drawn, user
from winnow.world.export import export


@pytest.fixture
def client(server: Server) -> Iterator[Any]:
    with openai.OpenAI(api_key=KEY, base_url=f"http://127.0.0.1:{server.port}/v1", max_retries=0) as own:
        yield own


def ask(client: Any, **fields: Any) -> Any:
    fields = {"model": NAME, "messages": [user(MOTORCYCLE, drawn(54).image)]} | fields
    return client.chat.completions.create(**fields)


def test_a_question_about_a_picture(client: Any) -> None:
    answer = ask(client)
    assert answer.choices[0].message.content == "yes"
    assert answer.choices[0].finish_reason == "stop"
    assert answer.usage.winnow == {"given": 256, "kept": 64, "plan": "hiprune:keep=64"}
    assert answer.usage.total_tokens == answer.usage.prompt_tokens + answer.usage.completion_tokens


def test_a_plan_in_the_extra_body(client: Any) -> None:
    answer = ask(client, extra_body={"winnow": {"plan": "divprune:keep=32"}})
    assert answer.choices[0].message.content == "yes"
    assert answer.usage.winnow == {"given": 256, "kept": 32, "plan": "divprune:keep=32"}


def test_the_code_of_the_page_says_what_the_page_says(
    server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    page = (ROOT / "docs" / "serving.md").read_text(encoding="utf-8")
    (code,) = re.findall(r"^```py\n(.*?)^```", page, re.DOTALL | re.MULTILINE)
    export(tmp_path / "scenes", 1, seed=54)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("WINNOW_API_KEY", KEY)
    exec(compile(code.replace(":8000/", f":{server.port}/"), "serving.md", "exec"), {})  # noqa: S102
    said = [line.partition("  # ")[2] for line in code.splitlines() if line.startswith("print(")]
    assert capsys.readouterr().out.splitlines() == said


def test_a_stream(client: Any) -> None:
    chunks = list(ask(client, stream=True, stream_options={"include_usage": True}))
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices) == "yes"
    assert chunks[-1].usage.winnow["kept"] == 64


def test_models(client: Any) -> None:
    assert [own.id for own in client.models.list()] == [NAME]
    assert client.models.retrieve(NAME).owned_by == "winnow"


def test_errors_are_those_that_the_client_knows(client: Any, server: Server) -> None:
    with pytest.raises(openai.BadRequestError) as raised:
        ask(client, max_tokens=-1)
    assert raised.value.param == "max_tokens"
    with pytest.raises(openai.NotFoundError) as raised:
        ask(client, model="gpt-4o")
    assert raised.value.code == "model_not_found"
    with (
        openai.OpenAI(api_key="another-key", base_url=f"http://127.0.0.1:{server.port}/v1", max_retries=0) as stranger,
        pytest.raises(openai.AuthenticationError),
    ):
        ask(stranger)
