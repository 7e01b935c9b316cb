"""Plans that requests bring: methods that the operator allows, settings that open no file, budgets within bounds.

A setting that takes a free word can name a file (`weights`, `calibration`) or another method (`base`), so a request
sets none of them; this is checked on the text, before anything of the plan is made.
"""

from __future__ import annotations

import dataclasses
import functools
import re
import types
import typing
from collections.abc import Iterable, Iterator, Sequence
from typing import Annotated, Any

from winnow.core.budget import Budget
from winnow.core.errors import WinnowError
from winnow.core.kv_budget import KVBudget
from winnow.core.plan import Plan, slugs_of
from winnow.core.registry import method_class
from winnow.core.settings import types_of
from winnow.core.signal import Signal
from winnow.serve.errors import ApiError, invalid, told
from winnow.serve.schema import SEED
from winnow.serve.settings import Settings

LONGEST = 500  # characters of a plan
METHODS = 4  # of a plan
LARGEST = 10_000  # a number in a setting: it can be a count of rounds
ITEMS = 64  # of a list in a setting
_CHARACTERS = re.compile(r"[\w\s:=,.%+|()?\[\]-]*", re.ASCII)


def requested_plan(text: str, settings: Settings) -> Plan:
    """The plan of a request.

    Raises:
        ApiError: it cannot be read, or is not allowed.
    """
    if len(text) > LONGEST or not _CHARACTERS.fullmatch(text):
        raise _refused(f"winnow.plan must have at most {LONGEST} letters, digits and :=,.%+|()[]?-")
    slugs = slugs_of(text)
    if len(slugs) > METHODS:
        raise _refused(f"winnow.plan names {len(slugs)} methods; at most {METHODS} are allowed")
    for slug in slugs:
        if slug not in settings.methods:
            raise _refused(f"winnow.plan: {slug[:64]!r} is not allowed here; allowed: {', '.join(settings.methods)}")
    closed = words(settings.methods)
    for name in re.findall(r"(\w+)\s*=", text):
        if name in closed:
            raise _refused(f"winnow.plan: a request cannot set {name!r}, which can name a file or another method")
    try:
        plan = Plan.parse(text)
    except WinnowError as error:
        problem = told(error)
    except (ArithmeticError, ValueError, RecursionError, MemoryError):  # of numbers and brackets beyond all bounds
        problem = "it cannot be read"
    else:
        _check_sizes(plan)
        return plan
    raise _refused(f"winnow.plan: {problem}")


def check_budgets(plan: Plan, sizes: Iterable[int], settings: Settings) -> None:
    """Refuse a plan of a request that keeps less or more than the operator allows.

    Args:
        sizes: content tokens of each picture.
    """
    budgets = [value for method in plan.methods for value in _values(method) if isinstance(value, Budget)]
    least, most = settings.least, settings.most
    for n in set(sizes):
        found = [budget.of(n) for budget in budgets] if plan.methods else [n]
        for kept in found:
            if not least.of(n) <= kept <= most.of(n):
                raise _refused(
                    f"winnow.plan keeps {kept} of the {n} tokens of a picture; this server allows {least} to {most}"
                )


@functools.cache
def words(slugs: Sequence[str]) -> frozenset[str]:
    """Names of settings, of these methods and of all signals, that take a free word."""
    methods = [types_of(method_class(slug)) for slug in slugs]
    signals = [typing.get_type_hints(kind) for kind in _below(Signal)]
    return frozenset(name for hints in (*methods, *signals) for name, hint in hints.items() if _takes_words(hint))


def _takes_words(hint: Any) -> bool:
    origin = typing.get_origin(hint)
    if origin is typing.ClassVar:
        return False
    if hint is str or hint is Any:
        return True
    if origin in (typing.Union, types.UnionType, Annotated, tuple, list):
        return any(_takes_words(arm) for arm in typing.get_args(hint))
    return False


def _below(kind: type) -> Iterator[type]:
    below: list[type] = kind.__subclasses__()
    for own in below:
        yield own
        yield from _below(own)


def _check_sizes(plan: Plan) -> None:
    if plan.seed >= SEED:
        raise _refused(f"winnow.plan: the seed must be below {SEED}")
    for value in (value for method in plan.methods for value in _values(method)):
        if isinstance(value, int | float) and abs(value) > LARGEST:
            raise _refused(f"winnow.plan: a number beyond {LARGEST} is not taken from a request")
        if isinstance(value, tuple) and len(value) > ITEMS:
            raise _refused(f"winnow.plan: a list has more than {ITEMS} items")


def _values(method: Any) -> Iterator[Any]:
    """The values of all settings, those inside lists and signals included."""
    for field in dataclasses.fields(method):
        yield from _inside(getattr(method, field.name))


def _inside(value: Any) -> Iterator[Any]:
    yield value
    if isinstance(value, tuple):
        for own in value:
            yield from _inside(own)
    elif isinstance(value, Signal):
        yield from _values(value)
    elif isinstance(value, KVBudget):
        yield from _inside(value.value)


def _refused(text: str) -> ApiError:
    return invalid(text.rstrip(".") + ".", "winnow.plan", "invalid_plan")
