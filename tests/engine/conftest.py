"""Uninitialised memory is full of NaN while the engine is tested, so that reading what was never written shows."""

import pytest
import torch


@pytest.fixture(autouse=True)
def poisoned_memory():
    torch.use_deterministic_algorithms(True)  # it is this mode in which torch fills what `empty` gives
    assert torch.empty(3).isnan().all()
    yield
    torch.use_deterministic_algorithms(False)
