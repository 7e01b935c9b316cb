"""Settings: a method's fields are checked from their types, so that a method says what it takes and nothing else."""

import dataclasses
import functools
import math
import types
import typing
from dataclasses import dataclass
from typing import Annotated, Any, Literal, get_args, get_origin

from winnow.core.budget import Budget
from winnow.core.errors import WinnowError
from winnow.core.kv_budget import KVBudget
from winnow.core.signal import Signal


@dataclass(frozen=True)
class Between:
    """Bounds of a number, both included; None: no bound."""

    least: float | None = None
    most: float | None = None

    def __str__(self) -> str:
        if self.most is None:
            return "" if self.least is None else f" ≥ {self.least:g}"
        return f" ≤ {self.most:g}" if self.least is None else f" from {self.least:g} to {self.most:g}"


Share = Annotated[float, Between(0, 1)]
"""A number from 0 to 1."""
Count = Annotated[int, Between(0)]
"""A whole number ≥ 0."""
Layer = Annotated[int, Between(0)]
"""An LM layer, from 0."""
Block = int | Literal["feature"]
"""A block of the vision tower: 0-based, negative from the end, or the one whose output feeds the projector."""


def types_of(method: Any) -> dict[str, Any]:
    """The type of each setting of a method or its class, with what `Annotated` adds."""
    return _types_of(method if isinstance(method, type) else type(method))


@functools.cache
def _types_of(cls: Any) -> dict[str, Any]:
    hints = typing.get_type_hints(cls, include_extras=True)
    return {f.name: hints[f.name] for f in dataclasses.fields(cls) if f.metadata.get("setting", True)}


def checked(owner: str, name: str, hint: Any, value: Any) -> Any:
    """The value of a setting, converted where its type asks for it (a number becomes a Budget)."""
    try:
        return _converted(hint, value)
    except _Mismatch:
        raise WinnowError(f"{owner}: {name}={value!r}; allowed: {described(hint)}.") from None
    except WinnowError as error:  # a budget says what is wrong with it, not which setting it is
        said = str(error).removeprefix("keep=")
        shown = said if said.startswith(repr(value)) else f"{value!r}: {said}"
        raise WinnowError(f"{owner}: {name}={shown}") from None


def described(hint: Any) -> str:
    """What a type allows, in words."""
    origin = get_origin(hint)
    if origin is Annotated:
        inner, *extra = get_args(hint)
        bounds = "".join(str(e) for e in extra if isinstance(e, Between))
        return described(inner) + bounds
    if origin is Literal:
        return ", ".join(str(v).lower() if isinstance(v, bool) else str(v) for v in get_args(hint))
    if origin in (typing.Union, types.UnionType):
        return ", or ".join(described(arm) for arm in get_args(hint))
    if origin is tuple:
        return f"a list of: {described(get_args(hint)[0])}"
    words = {bool: "true, false", int: "an int", float: "a number", str: "a word", type(None): "none"}
    if hint in words:
        return words[hint]
    if isinstance(hint, type) and issubclass(hint, Budget):
        return "a budget (64, 0.25, 25%)"
    if isinstance(hint, type) and issubclass(hint, KVBudget):
        return "a budget of the cache (512, 20%, 1.5GB, mass=0.95, [visual=10%,text=100%])"
    if isinstance(hint, type) and issubclass(hint, Signal):
        return f"a signal such as {hint.__name__}(…)"
    return getattr(hint, "__name__", str(hint))


class _Mismatch(Exception):
    """A value does not fit a type."""


def _converted(hint: Any, value: Any) -> Any:
    origin = get_origin(hint)
    if origin is Annotated:
        inner, *extra = get_args(hint)
        value = _converted(inner, value)
        for bound in extra:
            _within(bound, value)
        return value
    if origin is Literal:
        _need(any(value == v and type(value) is type(v) for v in get_args(hint)))
        return value
    if origin in (typing.Union, types.UnionType):
        return _first(get_args(hint), value)
    if origin is tuple:
        signals = isinstance(get_args(hint)[0], type) and issubclass(get_args(hint)[0], Signal)
        _need(isinstance(value, tuple | list) and (signals or len(value) > 0))
        return tuple(_converted(get_args(hint)[0], v) for v in value)
    if hint is float:
        _need(isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value))
        return value
    if hint is int:
        _need(isinstance(value, int) and not isinstance(value, bool))
        return value
    if isinstance(hint, type) and issubclass(hint, Budget):
        return Budget.parse(value)  # whose own message says what is allowed
    if isinstance(hint, type) and issubclass(hint, KVBudget):
        return KVBudget.parse(value)
    if isinstance(hint, type):
        _need(isinstance(value, hint))
    return value


def _first(arms: tuple[Any, ...], value: Any) -> Any:
    """The value as the first arm of a union that takes it."""
    for arm in arms:
        try:
            return _converted(arm, value)
        except (_Mismatch, WinnowError):
            continue
    raise _Mismatch


def _within(bound: Any, value: Any) -> None:
    if isinstance(bound, Between):
        _need((bound.least is None or value >= bound.least) and (bound.most is None or value <= bound.most))


def _need(holds: bool) -> None:
    if not holds:
        raise _Mismatch
