"""Checks of a method's settings: what was got, what is allowed."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

from winnow.core.errors import WinnowError

if TYPE_CHECKING:
    from winnow.core.method import Method


def one_of(method: Method, name: str, allowed: tuple[str, ...]) -> None:
    """The setting is one of these words."""
    value = getattr(method, name)
    if not isinstance(value, str) or value not in allowed:
        raise WinnowError(f"{method.slug}: {name}={value!r}; allowed: {', '.join(allowed)}.")


def switch(method: Method, name: str) -> None:
    """The setting is true or false."""
    value = getattr(method, name)
    if not isinstance(value, bool):
        raise WinnowError(f"{method.slug}: {name}={value!r}; allowed: true, false.")


def whole(method: Method, name: str, value: Any, least: int | None = 0) -> None:
    """A value of the setting is an int, and not below `least`."""
    if isinstance(value, bool) or not isinstance(value, int) or (least is not None and value < least):
        floor = "" if least is None else f" ≥ {least}"
        raise WinnowError(f"{method.slug}: {name}={value!r}; allowed: an int{floor}.")


def block(method: Method, name: str) -> None:
    """The setting names a block of the vision tower: a number, or `feature`."""
    value = getattr(method, name)
    if value != "feature" and (isinstance(value, bool) or not isinstance(value, int)):
        raise WinnowError(f"{method.slug}: {name}={value!r}; allowed: feature, or the number of a vision block.")


def share(method: Method, name: str, least: float = 0.0, most: float = 1.0, also: str = "") -> None:
    """The setting is a finite number in [least, most]."""
    value = getattr(method, name)
    number = isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
    if not number or not least <= value <= most:
        raise WinnowError(f"{method.slug}: {name}={value!r}; allowed: a number from {least:g} to {most:g}{also}.")
