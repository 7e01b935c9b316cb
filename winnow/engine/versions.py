"""The names that changed between versions of transformers. Found by looking at the callables, never by the version."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import transformers
from torch import Tensor, nn
from transformers import masking_utils

from winnow.core.errors import UnsupportedError

NAMES = ("cache", "past_key_values")  # newest first; 5.24 renamed the keyword


@dataclass(frozen=True)
class CacheKeyword:
    """The keyword of one callable for its KV cache.

    A hook runs before the shim that renames the old keyword, so a caller's old keyword is still in the arguments then.
    The other way round, `cache` on an older version is another thing: the pool of continuous batching.
    """

    name: str

    def get(self, kwargs: dict[str, Any]) -> Any:
        """The cache among keyword arguments, or None. Where both keywords stand, the new one counts, as in the shim."""
        if self.name in kwargs:
            return kwargs[self.name]
        return kwargs.get("past_key_values")

    def put(self, kwargs: dict[str, Any], cache: Any) -> None:
        """Set the cache in place, under the callable's own keyword alone."""
        kwargs.pop("past_key_values", None)
        kwargs[self.name] = cache

    def of(self, cache: Any) -> dict[str, Any]:
        """The cache as a keyword argument: `layer(hidden, **keyword.of(cache))`."""
        return {self.name: cache}


def cache_keyword(call: nn.Module | Callable[..., Any]) -> CacheKeyword:
    """The keyword of a module's forward, or of a function.

    Raises:
        UnsupportedError: neither name is among the parameters.
    """
    # The class is asked: an instance may carry a wrapper of its own (accelerate) that hides the parameters.
    return _keyword(type(call).forward if isinstance(call, nn.Module) else call)


@functools.cache
def _keyword(function: Callable[..., Any]) -> CacheKeyword:
    parameters = inspect.signature(function).parameters
    for name in NAMES:
        if name in parameters:
            return CacheKeyword(name)
    raise UnsupportedError(
        f"{function.__qualname__} of transformers {transformers.__version__} takes its cache neither as "
        f"{' nor as '.join(NAMES)}; this version is not known. Install one that winnow supports."
    )


def cache_of(output: Any) -> Any:
    """The cache that a model's output carries, or None."""
    name = next((name for name in NAMES if name in getattr(output, "__dataclass_fields__", ())), None)
    return None if name is None else getattr(output, name)


def causal_mask(config: Any, embeds: Tensor, mask: Tensor | None, cache: Any, **options: Any) -> Any:
    """`transformers.masking_utils.create_causal_mask` for inputs `[B, N, D]` and a 2-D mask of real tokens.

    Args:
        cache: what answers for the tokens that are held already; None if there are none.
        options: `position_ids`, `layer_idx`, …, as they are.
    """
    make = masking_utils.create_causal_mask
    return make(config=config, inputs_embeds=embeds, attention_mask=mask, **cache_keyword(make).of(cache), **options)


def checkpoints_activations(model: Any) -> bool:
    """Whether some module of the model runs again in the backward pass (gradient checkpointing, renamed in 5.23)."""
    for name in ("is_activation_checkpointing", "is_gradient_checkpointing"):
        if hasattr(type(model), name):
            return bool(getattr(model, name))
    return False


def hidden_state_layers(count: int, depth: int) -> tuple[int, ...]:
    """For each of `count` recorded hidden states of an LM of `depth` layers, the layer whose tokens it has.

    A full record starts with what enters layer 0. A selection (`output_hidden_states=[1]`) did not before 5.23: entry i
    was what leaves layer i. States that were not asked for are None in either.

    Raises:
        UnsupportedError: another number of states.
    """
    if count == depth + 1:
        return (0, *range(depth))
    if count == depth:
        return tuple(range(depth))
    raise UnsupportedError(
        f"the LM recorded {count} hidden states for {depth} layers; {depth} or {depth + 1} are understood. "
        "Leave output_hidden_states out, or use a version of transformers that winnow supports."
    )
