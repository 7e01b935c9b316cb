"""The type checker that jaxtyping runs on winnow's functions while the tests run; see conftest.py.

Only annotations with a shape are checked. The others are mypy's; and the settings of a method are converted from what
users give, which their annotations do not say.
"""

from __future__ import annotations

import dataclasses
import functools
import inspect
import re
import types
from collections.abc import Callable
from typing import Any

import jaxtyping
import torch
from beartype import beartype
from jaxtyping import TypeCheckError
from jaxtyping._array_types import _anonymous_dim, _FixedDim, _MetaAbstractArray, _NamedDim
from jaxtyping._decorator import _destring_annotation, _make_fn_with_signature
from jaxtyping._storage import get_shape_memo, pop_shape_memo, push_shape_memo, shape_str

_SHAPED = re.compile(r"\b(?:Float|Int|Bool|Shaped|Num)\[")


def check_what_has_a_shape() -> None:
    """Let jaxtyping's import hook wrap functions that promise a shape, and in our way; nothing of others is checked."""
    plain = jaxtyping.jaxtyped

    def jaxtyped(*, typechecker: Any) -> Callable[[Any], Any]:
        wrap = plain(typechecker=typechecker)

        def decorate(made: Any) -> Any:
            if dataclasses.is_dataclass(made):
                begin = vars(made).get("__init__")
                if isinstance(begin, types.FunctionType) and not hasattr(begin, "__wrapped__"):
                    made.__init__ = decorate(begin)
                return made
            if not isinstance(made, types.FunctionType):
                return wrap(made)
            return _checking(made, wrap) if promises_a_shape(made) else made

        return decorate

    jaxtyping.jaxtyped = jaxtyped
    _MetaAbstractArray.__instancecheck__ = has_shape


in_full = _MetaAbstractArray.__instancecheck__


def has_shape(kind: Any, thing: Any) -> bool:
    """What jaxtyping finds, for the commonest kinds in a third of the time: a tensor whose axes have names or sizes."""
    axes = _axes(kind)
    if axes is None or type(thing) is not torch.Tensor or not _takes(kind, thing.dtype):
        return in_full(kind, thing)
    if len(axes) != thing.ndim:
        return False
    known = get_shape_memo()[0]
    found: dict[str, int] = {}
    for axis, size in zip(axes, thing.shape, strict=True):
        if axis is None:
            continue
        wanted = axis if isinstance(axis, int) else known.get(axis, found.setdefault(axis, size))
        if wanted != size:
            return False
    known.update(found)
    return True


@functools.cache
def _axes(kind: Any) -> tuple[str | int | None, ...] | None:
    """A name, a size or nothing for each axis; None if an axis says more, or if others than tensors are meant."""
    found: list[str | int | None] = []
    for axis in kind.dims:
        if axis is _anonymous_dim:
            found.append(None)
        elif type(axis) is _NamedDim and not (axis.broadcastable or axis.treepath):
            found.append(axis.name)
        elif type(axis) is _FixedDim and not axis.broadcastable:
            found.append(axis.size)
        else:
            return None
    return tuple(found) if kind.array_type is torch.Tensor else None


@functools.cache
def _takes(kind: Any, dtype: torch.dtype) -> bool:
    """Whether a tensor of this dtype can be of this kind."""
    sizes = [axis if isinstance(axis, int) else 1 for axis in _axes(kind) or ()]
    push_shape_memo({})
    try:
        return in_full(kind, torch.empty(sizes, dtype=dtype, device="meta"))
    finally:
        pop_shape_memo()


def _checking(function: Callable[..., Any], wrap: Callable[[Any], Any]) -> Callable[..., Any]:
    """What `wrap` promises. It binds the arguments of each call, and checks them again with the result: a third of what
    a compressed call of a tiny model costs. Here that is done where something is wrong, to say what.
    """
    signature, full = inspect.signature(function), wrap(function)
    hints = {name: _destring_annotation(hint, function.__globals__) for name, hint in function.__annotations__.items()}
    if any("{" in str(hint) for hint in hints.values()):  # an axis as long as an argument says
        return full
    given = [p.replace(annotation=hints.get(p.name, p.empty)) for p in signature.parameters.values()]
    take = _checker(function, given)
    give = _checker(function, [inspect.Parameter("returned", _FIRST, annotation=hints.get("return", inspect._empty))])

    @functools.wraps(function)
    def call(*args: Any, **kwargs: Any) -> Any:
        __tracebackhide__ = True
        memo = push_shape_memo({})
        try:
            try:
                take(*args, **kwargs)
            except Exception:
                return full(*args, **kwargs)
            found = function(*args, **kwargs)
            try:
                give(found)
            except Exception as error:
                name = f"{function.__module__}.{function.__qualname__}"
                raise TypeCheckError(f"What {name} should return: {error}\n{shape_str(memo)}") from error
            return found
        finally:
            pop_shape_memo()

    return call


_FIRST = inspect.Parameter.POSITIONAL_ONLY


def _checker(function: Callable[..., Any], parameters: list[inspect.Parameter]) -> Callable[..., None]:
    """A function that takes these parameters, and does nothing but check them."""
    signature = inspect.Signature(parameters, return_annotation=Any)
    return checked(
        _make_fn_with_signature(function.__name__, function.__qualname__, function.__module__, signature, output=False)
    )


def promises_a_shape(function: Callable[..., Any]) -> bool:
    """Whether an annotation has a shape, as jaxtyping reads it: also by another name."""
    hints = (_destring_annotation(hint, function.__globals__) for hint in function.__annotations__.values())
    return any(_SHAPED.search(str(hint)) for hint in hints)


def checked(function: Callable[..., Any]) -> Callable[..., Any]:
    """beartype on what is annotated with a shape."""
    hints = function.__annotations__
    function.__annotations__ = {name: hint for name, hint in hints.items() if _SHAPED.search(str(hint))}
    return beartype(function) if function.__annotations__ else function
