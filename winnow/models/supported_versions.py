"""Which versions of transformers winnow runs on: from the oldest to the newest that its tests run on."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

import transformers

from winnow.core.errors import UnsupportedError

OLDEST, NEWEST = (5, 19), (5, 24)  # major and minor; the tests run on one version of each
RANGE = f"transformers ≥ {OLDEST[0]}.{OLDEST[1]}, < {NEWEST[0]}.{NEWEST[1] + 1}"

_accepted: set[tuple[str, str]] = set()
_trying: ContextVar[bool] = ContextVar("winnow_trying_a_version", default=False)


def check_version(model: str) -> None:
    """Refuse a version outside the range. A newer one passes for a class of model that `accept` has named.

    Args:
        model: the name of the model's class.

    Raises:
        UnsupportedError: with what to install, or how to check a newer version.
    """
    version = installed()
    if _read(version) < OLDEST:
        raise UnsupportedError(f"transformers {version} is outside the range that winnow knows; install {RANGE}.")
    if is_untested() and not _trying.get() and (version, model) not in _accepted:
        raise UnsupportedError(
            f"transformers {version} is outside the range that winnow knows; install {RANGE}. Or let winnow check it: "
            f"winnow.engine.doctor.diagnose(model, processor) accepts it for {model}, in this process, if all is right."
        )


def installed() -> str:
    """The installed version."""
    return transformers.__version__


def is_untested() -> bool:
    """Whether the installed version is newer than all that winnow is tested with."""
    return _read(installed()) > NEWEST


@contextmanager
def trying() -> Iterator[None]:
    """Let any newer version pass in this context, so that it can be checked."""
    token = _trying.set(True)
    try:
        yield
    finally:
        _trying.reset(token)


def is_trying() -> bool:
    """Whether a model is being checked in this context."""
    return _trying.get()


def accept(model: str) -> None:
    """From now on the installed version passes for this class of model, in this process."""
    _accepted.add((installed(), model))


def _read(version: str) -> tuple[int, int]:
    """Major and minor; a version that cannot be read is older than any."""
    found = re.match(r"(\d+)\.(\d+)", version)
    return (0, 0) if found is None else (int(found[1]), int(found[2]))
