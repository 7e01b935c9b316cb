"""Gradient checkpointing under a plan: layers of the language model that run again in the backward pass.

What a layer is given is changed before the layer is checkpointed, so that what is saved, and run again later, is what
was kept. In the backward pass there is no request: nothing is chosen again, and hooks and taps are silent.
"""

import copy
import functools
from collections.abc import Callable
from typing import Any

from torch import nn
from transformers.modeling_layers import GradientCheckpointingLayer

from winnow.core.errors import UnsupportedError
from winnow.engine.bound_model import BoundModel
from winnow.engine.versions import hooks_run_again

_FUNCTION = "_gradient_checkpointing_func"

Change = Callable[[nn.Module, tuple[Any, ...], dict[str, Any]], Any]


def is_checkpointed(layer: nn.Module) -> bool:
    """Whether a layer that is called now is checkpointed by transformers."""
    return layer.training and bool(getattr(layer, "gradient_checkpointing", False))


def without_cache(bound: BoundModel, arguments: dict[str, Any]) -> dict[str, Any]:
    """The arguments of a language model whose layers are checkpointed: those layers neither read a cache nor fill it.

    transformers says so only inside the language model, and some versions only while gradients are on.

    Raises:
        UnsupportedError: a cache came along, or the layers are checkpointed in a way that is not known.
    """
    lm = bound.lm
    if not lm.training or not (getattr(lm, "gradient_checkpointing", False) or any(map(is_checkpointed, bound.layers))):
        return arguments
    other = next((layer for layer in bound.layers if not isinstance(layer, GradientCheckpointingLayer)), None)
    if other is not None:
        raise UnsupportedError(
            f"gradient checkpointing of {type(other).__name__} is not known to winnow: it is no "
            "GradientCheckpointingLayer of transformers. Call model.gradient_checkpointing_disable(), or train without "
            "compression."
        )
    if arguments.get(bound.cache_name) is not None:
        raise UnsupportedError(
            "with gradient checkpointing, layers in training mode leave the KV cache as it is, so an answer cannot be "
            "generated; call model.eval() first, or model.gradient_checkpointing_disable()."
        )
    return {**arguments, "use_cache": False}


class BeforeCheckpoint:
    """Stands in for what checkpoints one layer, and changes what the layer is given first.

    Needed where transformers runs the hooks of a layer inside its checkpoint (up to 5.22), from where they would run
    again in the backward pass.

    Args:
        change: gets the layer and its arguments, and gives new ones, or None.
    """

    def __init__(self, change: Change, layer: nn.Module) -> None:
        self.change, self.layer = change, layer
        self.plain = getattr(layer, _FUNCTION)
        setattr(layer, _FUNCTION, self)

    def __call__(self, call: Any, *args: Any) -> Any:
        """As `torch.utils.checkpoint.checkpoint`: `call` is the layer's `__call__` with its keyword arguments."""
        changed = self.change(self.layer, args, call.keywords)
        if changed is not None:
            args, arguments = changed
            call = functools.partial(call.func, *call.args, **arguments)
        return self.plain(call, *args)

    def remove(self) -> None:
        """Give the layer its function back; where somebody has set another since, that one stays."""
        if self.layer.__dict__.get(_FUNCTION) is self:
            setattr(self.layer, _FUNCTION, self.plain)

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        return copy.deepcopy(self.plain, memo)

    def __reduce__(self) -> tuple[Any, ...]:
        return _same, (self.plain,)


def _same(function: Any) -> Any:
    return function


def before_checkpoint(change: Change, layer: nn.Module) -> BeforeCheckpoint | None:
    """What lets a layer be changed before it is checkpointed; None where its own hooks come before that."""
    return BeforeCheckpoint(change, layer) if is_checkpointed(layer) and hooks_run_again() else None
