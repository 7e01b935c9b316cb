"""One studio for all tests of this folder, which ends well."""

from __future__ import annotations

import signal
from collections.abc import Iterator

import pytest
from serve.process import MOTORCYCLE

from studio.process import BROKEN, STORE, StudioServer
from tests.bench import synthetic

SMALL = {"questions": 39, "budgets": (64, 16), "methods": ("fastervlm", "visionzip"), "pictures": 2}


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """All on one worker, which starts one studio."""
    for item in items:
        if "/studio/" in item.nodeid:
            item.add_marker(pytest.mark.xdist_group("studio"))


@pytest.fixture(scope="session")
def shared_studio(tmp_path_factory: pytest.TempPathFactory) -> Iterator[StudioServer]:
    folder = tmp_path_factory.mktemp("studio")
    synthetic.accuracy(folder / STORE, **SMALL)
    (folder / BROKEN).write_text("this is no store")
    studio = StudioServer(folder)
    try:
        yield studio
        assert studio.process.poll() is None, studio.log
        studio.signal(signal.SIGINT)
        assert studio.ended(20) == 130  # Ctrl-C
        assert not [line for line in studio.log if "Traceback" in line]
        made = {path.name.partition(".")[0] for path in folder.iterdir()}
        assert made == {"runs", "broken"}  # the studio writes no file, but what SQLite keeps beside an open store
    finally:
        studio.stop()


@pytest.fixture(scope="module")
def studio(shared_studio: StudioServer) -> Iterator[StudioServer]:
    """Behind the tests of a file, the next good request is answered right."""
    yield shared_studio
    answer = shared_studio.ask(MOTORCYCLE, "world:54", "hiprune:keep=64")
    assert (answer.status, answer.json["answer"]) == (200, "yes")
