"""The type checker that jaxtyping runs on winnow's functions while the tests run; see conftest.py.

Only annotations with a shape are checked. The others are mypy's; and the settings of a method are converted from what
users give, which their annotations do not say.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

from beartype import beartype

_SHAPED = re.compile(r"\b(?:Float|Int|Bool|Shaped|Num)\[")


def checked(function: Callable[..., Any]) -> Callable[..., Any]:
    """beartype on what is annotated with a shape."""
    hints = function.__annotations__
    function.__annotations__ = {name: hint for name, hint in hints.items() if _SHAPED.search(str(hint))}
    return beartype(function) if function.__annotations__ else function
