"""Versions of transformers: which pass, which are refused, and with what to do."""

from __future__ import annotations

import pytest

from winnow.core.errors import UnsupportedError
from winnow.models import supported_versions
from winnow.models.supported_versions import accept, check_version, is_untested, trying


@pytest.fixture(autouse=True)
def nothing_accepted(monkeypatch):
    monkeypatch.setattr(supported_versions, "_accepted", set())


@pytest.fixture
def version(monkeypatch):
    # transformers puts another module object in its place while it imports its parts: this is the one that is asked.
    return lambda text: monkeypatch.setattr(supported_versions.transformers, "__version__", text)


def test_the_installed_version_is_one_that_the_tests_are_meant_to_run_on():
    check_version("Model")
    assert not is_untested()


@pytest.mark.parametrize("text", ["5.19.0", "5.20.2", "5.21.1", "5.22.2", "5.23.0", "5.24.0", "5.24.7"])
def test_from_the_oldest_to_the_newest_all_pass(version, text):
    version(text)
    check_version("Model")


@pytest.mark.parametrize("text", ["4.57.1", "5.18.0", "5.9.0", "unknown"])
def test_an_older_version_is_refused_whatever_is_tried(version, text):
    version(text)
    with trying(), pytest.raises(UnsupportedError, match=r"install transformers ≥ 5\.19, < 5\.25\.$"):
        check_version("Model")


@pytest.mark.parametrize("text", ["5.25.0", "5.25.0rc1", "5.100.0", "6.0.0.dev0"])
def test_a_newer_version_is_refused_until_it_is_accepted_for_the_class(version, text):
    version(text)
    assert is_untested()
    with pytest.raises(UnsupportedError, match=r"install transformers ≥ 5\.19, < 5\.25\. .*diagnose.*for Model, in"):
        check_version("Model")
    with trying():
        check_version("Model")
    with pytest.raises(UnsupportedError):
        check_version("Model")
    accept("Model")
    check_version("Model")
    with pytest.raises(UnsupportedError):
        check_version("Other")
    version("7.0.0")
    with pytest.raises(UnsupportedError):  # accepted was the version that was checked
        check_version("Model")
