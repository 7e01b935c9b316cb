"""Property tests: the same examples in every run, and no deadline on a machine that others use as well. The sample of
questions to the reference model, made once for all directional tests (mark them `xdist_group("samples")`)."""

from __future__ import annotations

import pytest
from hypothesis import settings

settings.register_profile("steady", deadline=None, derandomize=True)
settings.load_profile("steady")


@pytest.fixture(scope="session")
def samples():
    from tests.methods import directional  # opens the model's libraries, which most tests here do not need

    with directional.opened() as both:
        yield both


@pytest.fixture
def sample(samples):
    return samples[0]


@pytest.fixture(scope="session")
def few(samples):
    """Half of the scenes, for plans for which pictures have to be encoded anew."""
    return samples[0].first(45)


@pytest.fixture(scope="session")
def some(samples):
    """A third of the scenes, for plans that act in the tower, which encode each picture anew."""
    return samples[0].first(30)
