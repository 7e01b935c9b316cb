"""Uninitialised memory is full of NaN while the engine is tested, so that reading what was never written shows."""

import pytest
import torch

# Of LLaVA's kind one build is enough in the fast suite; methods run on both there (tests/methods/test_on_models.py).
TWINS = {"llava_siglip": "llava_clip"}


@pytest.fixture(autouse=True)
def poisoned_memory():
    torch.use_deterministic_algorithms(True)  # it is this mode in which torch fills what `empty` gives
    assert torch.empty(3).isnan().all()
    yield
    torch.use_deterministic_algorithms(False)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """A test on a build whose twin has the same test is part of the full suite."""
    here = [item for item in items if "tests/engine/" in item.nodeid]
    fast = {item.nodeid for item in here if item.get_closest_marker("full") is None}
    for item in here:
        for build, twin in TWINS.items():
            if build in item.nodeid and item.nodeid.replace(build, twin) in fast - {item.nodeid}:
                item.add_marker(pytest.mark.full)
