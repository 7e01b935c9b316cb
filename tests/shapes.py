"""The type checker that jaxtyping runs on winnow's functions while the tests run; see conftest.py.

Only annotations with a shape are checked. The others are mypy's; and the settings of a method are converted from what
users give, which their annotations do not say.
"""

from __future__ import annotations

import re
import types
from collections.abc import Callable
from typing import Any

import jaxtyping
from beartype import beartype
from jaxtyping._decorator import _destring_annotation

_SHAPED = re.compile(r"\b(?:Float|Int|Bool|Shaped|Num)\[")


def pass_by_what_has_no_shape() -> None:
    """Let jaxtyping's import hook leave functions alone that promise no shape: nothing of them is checked.

    It wraps every function otherwise, and binding its arguments at each call is a third of what a compressed call of
    a tiny model costs.
    """
    plain = jaxtyping.jaxtyped

    def jaxtyped(*, typechecker: Any) -> Callable[[Any], Any]:
        wrap = plain(typechecker=typechecker)

        def decorate(function: Any) -> Any:
            if isinstance(function, types.FunctionType) and not promises_a_shape(function):
                return function
            return wrap(function)

        return decorate

    jaxtyping.jaxtyped = jaxtyped


def promises_a_shape(function: Callable[..., Any]) -> bool:
    """Whether an annotation has a shape, as jaxtyping reads it: also by another name."""
    hints = (_destring_annotation(hint, function.__globals__) for hint in function.__annotations__.values())
    return any(_SHAPED.search(str(hint)) for hint in hints)


def checked(function: Callable[..., Any]) -> Callable[..., Any]:
    """beartype on what is annotated with a shape."""
    hints = function.__annotations__
    function.__annotations__ = {name: hint for name, hint in hints.items() if _SHAPED.search(str(hint))}
    return beartype(function) if function.__annotations__ else function
