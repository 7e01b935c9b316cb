"""`winnow serve --engine vllm`: a real server process on loopback, asked by the official `openai` client."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
from asking import TOKENS, Case, Library, picture
from serving import encoded, say, served

SHOWN = (1, 112, 112)
QUESTION = "what is in the picture ?"


@pytest.fixture(scope="module")
def client(vllm: Any, checkpoint: Callable[[str], str], tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    options = "--method fastervlm --keep 16 --allow divprune --max-keep 75% --max-pictures 2"
    with served(checkpoint("llava"), options.split(), tmp_path_factory.mktemp("server")) as client:
        yield client


def ask(client: Any, words: str = QUESTION, pictures: int = 1, winnow: Any = None) -> Any:
    url = f"data:image/png;base64,{encoded(picture(*SHOWN))}"
    return say(client, [{"type": "image_url", "image_url": {"url": url}}] * pictures, words, winnow)


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
