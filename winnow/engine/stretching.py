"""Rotary positions that a plan stretches: for all tokens of a request, and for all that its cache is asked later."""

import copy
import sys
from typing import Any

import torch
from torch import Tensor, nn

from winnow.core.errors import UnsupportedError, WinnowError
from winnow.core.method import Method
from winnow.core.stretch import Stretch
from winnow.engine.bound_model import BoundModel
from winnow.engine.bound_plan import BoundPlan

Stretches = tuple[Stretch | None, ...]


def stretching(plan: BoundPlan) -> Method | None:
    """The method of a plan that stretches positions, where there is one."""
    found = [method for method in plan.resolved.methods if method.stretch(sys.maxsize) is not None]
    if len(found) > 1:
        raise WinnowError(f"{plan.plan} stretches positions twice; leave it to one method.")
    return found[0] if found else None


def stretches_text(plan: BoundPlan) -> bool:
    """Whether a plan stretches the positions of a request without pictures as well."""
    return any(method.stretch(0) is not None for method in plan.resolved.methods)


def check_rotation(bound: BoundModel, plan: BoundPlan) -> None:
    """Refuse models whose rotation is another one, and plans that turn keys by it.

    Raises:
        UnsupportedError: what is not understood, and what can be done.
    """
    rotary, name = getattr(bound.lm, "rotary_emb", None), bound.info.model
    plain = hasattr(rotary, "inv_freq") and hasattr(rotary, "attention_scaling")
    if bound.info.mrope or not plain or getattr(rotary, "rope_type", None) != "default":
        raise UnsupportedError(
            f"{plan.plan} stretches rotary positions, which is built for one plain rotation of 1-D positions, and "
            f"{name} has another; leave them as they are (window=none)."
        )
    if plan.kv:
        raise UnsupportedError(
            f"{plan.plan} stretches rotary positions, and methods of the cache turn keys as {name} was trained; use "
            "one of the two (window=none)."
        )


def stretches_of(lm: Any) -> Stretches | None:
    """What holds for each row of a pass through the language model; None where nothing is stretched.

    Args:
        lm: the pass, whose items have come to the language model.

    Raises:
        WinnowError: what the cache holds was turned for fewer tokens.
    """
    held: Stretches | None = None if lm.state is None or not lm.before else lm.state.stretches
    method, rows = stretching(lm.plan), len(lm.tokens.packing.sizes)
    if method is None or (lm.before and not lm.items):
        return held
    tokens = [sum(item.n_lm for item in lm.items if item.row == row) for row in range(rows)]
    found = tuple(method.stretch(count) for count in tokens)
    if lm.before:
        least = held or (None,) * rows
        for new, old in zip(found, least, strict=True):
            if (1.0 if new is None else new.scale) > (1.0 if old is None else old.scale):
                raise WinnowError(
                    f"{lm.plan.plan} would stretch positions further for the pictures of this turn than for what the "
                    "cache holds, whose keys have been turned already; say the largest scale in advance (scale=…), or "
                    "start a new cache."
                )
        return held
    return found if any(own is not None for own in found) else None


class Stretched:
    """A hook behind the rotary embedding of a language model.

    Args:
        passing: gives the pass that is running, if one is.
    """

    def __init__(self, passing: Any) -> None:
        self.passing = passing
        self._made: dict[tuple[Stretch, torch.device], nn.Module] = {}

    def __call__(self, rotary: nn.Module, args: Any, kwargs: dict[str, Any], output: Any) -> Any:
        lm = self.passing()
        rows = None if lm is None else lm.stretches
        if rows is None:
            return None
        found = {own: output if own is None else self._turned(rotary, own, args, kwargs, output) for own in set(rows)}
        if len(found) == 1:
            return found[rows[0]]
        lanes = [[x.expand(len(rows), -1, -1)[row] for x in found[own]] for row, own in enumerate(rows)]
        return tuple(torch.stack(parts) for parts in zip(*lanes, strict=True))

    def _turned(self, rotary: Any, stretch: Stretch, args: Any, kwargs: dict[str, Any], output: Any) -> Any:
        """What the embedding gives with other frequencies, where it gave its own."""
        made: Any = self._of(rotary, stretch)
        here = made.inv_freq.device
        args = tuple(x.to(here) if isinstance(x, Tensor) else x for x in args)
        kwargs = {name: x.to(here) if isinstance(x, Tensor) else x for name, x in kwargs.items()}
        return tuple(x.to(own.device) for x, own in zip(made.forward(*args, **kwargs), output, strict=True))

    def _of(self, rotary: Any, stretch: Stretch) -> nn.Module:
        """The embedding with other frequencies."""
        own: Tensor = rotary.inv_freq
        key = (stretch, own.device)
        if key not in self._made:
            made: Any = copy.copy(rotary)
            # Where weights are on several devices, an instance has a forward of its own, which is bound to it.
            made.__dict__.pop("forward", None)
            made._buffers = dict(rotary._buffers)
            made.inv_freq = stretch.frequencies(own)
            made.attention_scaling = rotary.attention_scaling * stretch.temperature
            self._made[key] = made
        return self._made[key]
