"""One server process for all tests of this folder. It answers after each of them; after those of a file, a question."""

from __future__ import annotations

import os
from collections.abc import Iterator
from typing import Any

import pytest

import winnow
from serve.process import MOTORCYCLE, ROOT, Answer, Server, drawn, running
from winnow.models.inputs import model_inputs

PLAN = "hiprune:keep=64"


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """All on one worker, which starts one server."""
    for item in items:
        if "/serve/" in item.nodeid:
            item.add_marker(pytest.mark.xdist_group("serve"))


@pytest.fixture(scope="module")
def tests_importable() -> Iterator[None]:
    """`python -m serve.slow` finds the module."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", os.pathsep.join(filter(None, [str(ROOT / "tests"), os.environ.get("PYTHONPATH")])))
        yield


@pytest.fixture(scope="session")
def shared_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    folder = tmp_path_factory.mktemp("serve")
    with running(folder, "--method", PLAN, "--max-body", "4", "--max-keep", "128", "--time-limit", "60") as server:
        yield server
        assert server.process.poll() is None, server.log
        assert list(folder.iterdir()) == []  # a server writes no file


@pytest.fixture(scope="module")
def answering(shared_server: Server) -> Iterator[None]:
    yield
    answer = shared_server.ask(MOTORCYCLE, drawn(54).image)
    assert (answer.status, answer.text) == (200, "yes")


@pytest.fixture
def server(shared_server: Server, answering: None) -> Iterator[Server]:
    yield shared_server
    assert shared_server.send("GET", "/v1/models").status == 200


@pytest.fixture(scope="session")
def reference() -> tuple[Any, Any]:
    return winnow.load(plan=None)


@pytest.fixture(scope="session")
def library(reference: tuple[Any, Any]) -> Any:
    """The library's own answer: (text, prompt tokens that the first layer read, kept tokens)."""
    model, processor = reference

    def answer(picture: Any, question: str, plan: str, max_new_tokens: int = 16) -> tuple[str, int, int]:
        inputs = model_inputs(model, processor, picture, question)
        with winnow.compress(model, plan, processor=processor) as handle:
            ids = model.generate(**inputs, max_new_tokens=max_new_tokens, do_sample=False)
            ledger = handle.last
        text = processor.decode(ids[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
        return text, max(layer[0] for layer in ledger.layer_tokens), sum(len(item.kept) for item in ledger.items)

    return answer


def found(answer: Answer) -> tuple[str, int, int]:
    """What a server answered, as `library` gives it."""
    usage = answer.json["usage"]
    return answer.text, usage["prompt_tokens"], usage["winnow"]["kept"]
