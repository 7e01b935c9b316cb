"""The names that a version of transformers gives to its seams. Found by signature, never by version number."""

import functools
import inspect
from collections.abc import Callable
from typing import Any

CACHE_NAMES = ("past_key_values", "cache")


def cache_keyword(function: Callable[..., Any]) -> str:
    """The keyword under which a forward, a layer or a mask function takes the cache."""
    function = getattr(function, "__func__", function)
    return _cache_keyword(function)


@functools.cache
def _cache_keyword(function: Callable[..., Any]) -> str:
    names = inspect.signature(function).parameters
    return next((name for name in CACHE_NAMES if name in names), CACHE_NAMES[0])


def cache_of(kwargs: dict[str, Any]) -> Any:
    """The cache among keyword arguments, under whatever name."""
    for name in CACHE_NAMES:
        if kwargs.get(name) is not None:
            return kwargs[name]
    return None
