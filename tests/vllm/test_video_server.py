"""Videos in requests to `winnow serve --engine vllm`: a real server process, asked by the official `openai` client."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
from asking import Case, Film, Library
from PIL import Image
from serving import encoded, say, served

NAME, QUESTION = "llava_onevision", "what is in the picture ?"


@pytest.fixture
def client(vllm: Any, checkpoint: Callable[[str], str], tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    options = "--method divprune --keep 8 --frames 6"
    with served(checkpoint(NAME), options.split(), tmp_path_factory.mktemp("server")) as client:
        yield client


def test_a_video_is_answered_as_by_the_library(client: Any) -> None:
    film = Film(1, 6, 168, 112, 1.0)
    frames = ",".join(encoded(Image.fromarray(own)) for own in film.pixels)  # vLLM takes frames as pictures, too
    video = [{"type": "video_url", "video_url": {"url": f"data:video/jpeg;base64,{frames}"}}]
    library = Library(NAME)
    for winnow, plan in ((None, "divprune:keep=8"), ({"keep": "25%"}, "divprune:keep=25%"), (False, None)):
        found = say(client, video, QUESTION, winnow)
        said, tokens = library.answer(Case(f"# {QUESTION}", (), plan, (film,)))
        assert (found.choices[0].token_ids, found.usage.prompt_tokens) == (said, tokens)
