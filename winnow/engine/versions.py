"""The names that changed between versions of transformers. Found by looking at the callables, never by the version."""

import functools
import inspect
from collections.abc import Callable
from typing import Any

import transformers
from torch import nn
from transformers.modeling_layers import GradientCheckpointingLayer

from winnow.core.errors import UnsupportedError

CACHE_NAMES = ("cache", "past_key_values")  # newest first; 5.24 renamed the keyword


def cache_keyword(call: nn.Module | Callable[..., Any]) -> str:
    """The keyword under which a module's forward, or a function, takes its KV cache.

    Raises:
        UnsupportedError: none of the known names is among the parameters.
    """
    # A module's class is asked: an instance may carry a wrapper of its own (accelerate) that hides the parameters.
    function = type(call).forward if isinstance(call, nn.Module) else call
    return _cache_keyword(getattr(function, "__func__", function))


@functools.cache
def _cache_keyword(function: Callable[..., Any]) -> str:
    parameters = inspect.signature(function).parameters
    for name in CACHE_NAMES:
        if name in parameters:
            return name
    raise UnsupportedError(
        f"{function.__qualname__} of transformers {transformers.__version__} takes a KV cache under none of the names "
        f"{', '.join(CACHE_NAMES)}; winnow does not know this version. Install one that it supports."
    )


def cache_of(values: dict[str, Any]) -> Any:
    """The KV cache among keyword arguments, or in a model's output; None if there is none.

    A hook sees the caller's old keyword, because transformers renames it inside the forward. Where both are given, the
    new one counts there too.
    """
    for name in CACHE_NAMES:
        if (found := dict.get(values, name, values)) is not values:  # an output's own `get` warns of old names
            return found
    return None


@functools.cache
def hooks_run_again() -> bool:
    """Whether the hooks of a checkpointed layer lie inside its checkpoint; since 5.23 they stay outside."""
    return "__call__" in vars(GradientCheckpointingLayer)
