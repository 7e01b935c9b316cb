"""Hooks: what is attached to a model's own seams while a plan holds, and how it comes off."""

import functools
import inspect
import types
from collections.abc import Callable
from typing import Any

import torch
from torch import nn


class Hook:
    """A hook that lives in this process only: copies and pickles of a compressed model are plain models."""

    def __init__(self, call: Callable[..., Any] | None = None) -> None:
        self.call = call

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return None if self.call is None else self.call(*args, **kwargs)

    def __deepcopy__(self, memo: dict[int, Any]) -> "Hook":
        return Hook()

    def __reduce__(self) -> tuple[Any, ...]:
        return Hook, ()


def stand_in(owner: nn.Module, method: Any) -> Callable[[], None]:
    """Put a method in the place of one of a module's own; what is returned puts that back."""
    was = owner.__dict__.get(method.name)  # somebody else's, such as the forward that accelerate puts there
    setattr(owner, method.name, method)
    if was is not None:
        return functools.partial(setattr, owner, method.name, was)
    return functools.partial(owner.__dict__.pop, method.name, None)


class ForwardMethod:
    """Stands in for the forward of one module, so that a request ends however the forward ends.

    A module hook would not run after a KeyboardInterrupt; `try/finally` does. Under torch.compile the forward is not
    traced, and runs eagerly inside the compiled caller.

    Args:
        run: gets the plain forward and the keyword arguments by name.
        module: whose forward it is.
    """

    def __init__(self, run: Callable[..., Any], module: nn.Module) -> None:
        self.run, self.module = run, module
        self.plain = module.forward
        functools.update_wrapper(self, self.plain)
        names = inspect.signature(type(module).forward).parameters
        self._names = tuple(name for name in names if name != "self")
        self._eager = torch.compiler.disable(self._call)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return (self._eager if torch.compiler.is_compiling() else self._call)(*args, **kwargs)

    def _call(self, *args: Any, **kwargs: Any) -> Any:
        if args:
            kwargs = {**dict(zip(self._names, args, strict=False)), **kwargs}
        return self.run(self.plain, kwargs)

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        return _plain_forward(memo.get(id(self.module), self.module))

    def __reduce__(self) -> tuple[Any, ...]:
        return _plain_forward, (self.module,)

    def reached_by(self, forward: Any) -> bool:
        """Whether calling this forward leads here: it is this one, or wraps it, as accelerate's does."""
        while forward is not None:
            if forward is self:
                return True
            forward = getattr(forward, "__wrapped__", None)
        return False

    def remove(self) -> None:
        """Give the module its forward back; where somebody has wrapped this one since, it stays and does nothing."""
        if self.module.__dict__.get("forward") is not self:
            return
        if getattr(self.plain, "__func__", None) is type(self.module).forward:
            del self.module.__dict__["forward"]
        else:
            self.module.forward = self.plain


def _plain_forward(module: nn.Module) -> Any:
    return types.MethodType(type(module).forward, module)
