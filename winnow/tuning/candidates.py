"""Candidates: plans made from the registry, and plans near those that lead: budgets, settings, compositions."""

from __future__ import annotations

import math
import types
import typing
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Annotated, Any, Literal, get_args, get_origin

from winnow.core.budget import Budget
from winnow.core.errors import UnsupportedError, WinnowError
from winnow.core.info import ModelInfo
from winnow.core.method import Method
from winnow.core.plan import Plan
from winnow.core.plan_file import names_file
from winnow.core.registry import method_class, picture_methods
from winnow.core.settings import Between, Layer, types_of

BUDGETS = ("50%", "25%", "12.5%", "6.25%")
STEP = math.sqrt(2)  # between a plan's budget and the next one


@dataclass(frozen=True)
class Part:
    """A method of a plan, and its budget.

    Attributes:
        budget: content tokens that it leaves; None: its own settings say.
        content: content tokens that it is given.
    """

    method: Method
    budget: int | None
    content: int

    def at(self, budget: float) -> Part | None:
        """The same method at another budget; None where that is no other, or more than it is given."""
        count = max(1, round(budget))
        if self.budget is None or count == self.budget or count >= self.content:
            return None
        return Part(self.method.at_budget(count, self.content), count, self.content)


@dataclass(frozen=True)
class Candidate:
    """A plan of one or more parts.

    Attributes:
        table: whether it is one method at its default settings, as the tables of the documentation have it.
    """

    parts: tuple[Part, ...]
    positions: str = "keep"
    seed: int = 0
    table: bool = False

    @cached_property
    def plan(self) -> Plan:
        return Plan(tuple(part.method for part in self.parts), self.positions, self.seed)

    @property
    def key(self) -> str:
        return self.plan.key

    def with_part(self, number: int, part: Part) -> Candidate:
        parts = (*self.parts[:number], part, *self.parts[number + 1 :])
        return replace(self, parts=parts, table=False)


def first(
    named: Sequence[str], budgets: Sequence[int | float | str], content: int, positions: str | None = None
) -> list[Candidate]:
    """Each method at each budget with its default settings; plans and plan files as they are.

    Args:
        named: slugs, plans and plan files; none: every method of the registry that needs no training.
        content: content tokens of a typical item.
    """
    slugs = named or [
        entry.slug for entry in picture_methods() if entry.family != "user" and entry.kind == "training-free"
    ]
    found: list[Candidate] = []
    for name in slugs:
        if names_file(name) or any(mark in name for mark in ":+|"):
            plan = Plan.of(name, positions=positions)
            parts = tuple(Part(method, None, content) for method in plan.methods)
            found.append(Candidate(parts, plan.positions, plan.seed))
        else:
            found += _at_budgets(method_class(name.strip()).configured(), budgets, content, positions or "keep")
    unique = {candidate.key: candidate for candidate in found if candidate.parts}
    if not unique:
        raise WinnowError("There is no candidate; `winnow methods` lists what can be named.")
    return list(unique.values())


def _at_budgets(
    method: Method, budgets: Sequence[int | float | str], content: int, positions: str
) -> Iterator[Candidate]:
    for budget in budgets:
        number = int(budget) if isinstance(budget, str) and budget.strip().isdecimal() else budget
        count = Budget.parse(number).rounded(method.rounding).of(content)
        try:
            part = Part(method.at_budget(count, content), count, content)
        except UnsupportedError:
            yield Candidate((Part(method, None, content),), positions, table=True)
            return
        yield Candidate((part,), positions, table=True)


Bind = Callable[[Plan], Any]


def usable(candidates: Iterable[Candidate], bind: Bind) -> tuple[list[Candidate], dict[str, str]]:
    """Those that the model can run, and why the others cannot.

    Args:
        bind: raises a WinnowError where the model cannot run a plan.
    """
    good, bad = [], {}
    for candidate in candidates:
        try:
            bind(candidate.plan)
            good.append(candidate)
        except WinnowError as error:
            bad[str(candidate.plan)] = str(error)
    return good, bad


def children(
    parent: Candidate, info: ModelInfo, later: Sequence[Method], *, faster: bool, positions: str | None = None
) -> Iterator[Candidate]:
    """Plans near a leading one: what is tried next, most promising first.

    Args:
        later: methods that may go on where the parent's end, best first.
        faster: whether the parent keeps the limit, so that less may do; otherwise more is tried.
    """
    for number in reversed(range(len(parent.parts))):
        part = parent.parts[number]
        near = part.at((part.budget or 0) / STEP if faster else (part.budget or 0) * STEP)
        if near is not None and _leaves_enough(near, parent.parts[number + 1 :]):
            yield parent.with_part(number, near)
    if faster:
        yield from _composed(parent, info, later)
    for number, part in enumerate(parent.parts):
        for method in _varied(part.method, info):
            yield parent.with_part(number, replace(part, method=method))
    if positions is None and not info.mrope:
        yield replace(parent, positions="compact" if parent.positions == "keep" else "keep", table=False)


def _leaves_enough(part: Part, behind: Sequence[Part]) -> bool:
    return all(part.budget is None or later.budget is None or later.budget < part.budget for later in behind)


def _composed(parent: Candidate, info: ModelInfo, later: Sequence[Method]) -> Iterator[Candidate]:
    """The parent, and behind its last step another method that keeps a half or a quarter of what it left."""
    left = parent.parts[-1].budget
    if left is None:
        return
    behind = _last(parent, info)
    for share in (2, 4):
        for method in later:
            if left // share < 1 or behind is None or _first(method, info) <= behind:
                continue
            try:
                added = Part(method.at_budget(left // share, left), left // share, left)
            except WinnowError:
                continue
            yield replace(parent, parts=(*parent.parts, added), table=False)


def _ranks(method: Method, info: ModelInfo) -> list[Any]:
    try:
        return [step.at.rank for step in method.bind(info)[1]]
    except WinnowError:
        return []


def _last(candidate: Candidate, info: ModelInfo) -> Any:
    return max((rank for part in candidate.parts for rank in _ranks(part.method, info)), default=None)


def _first(method: Method, info: ModelInfo) -> Any:
    return min(_ranks(method, info), default=(-1, -1, -1))


def _varied(method: Method, info: ModelInfo) -> Iterator[Method]:
    """The method with one setting changed, and as its authors released it."""
    try:
        definite = method.resolve(info)
    except WinnowError:
        definite = method
    for name, hint in types_of(method).items():
        own = getattr(method, name)
        for value in _others(hint, getattr(definite, name) if own is None else own, info):
            try:
                yield method.replace(**{name: value})
            except WinnowError:
                continue
    if method.released is not None:
        try:
            own = method.replace(**{k: v for k, v in method.released.items() if k != "positions"})
        except WinnowError:
            return
        if own != method:
            yield own


def _others(hint: Any, value: Any, info: ModelInfo) -> list[Any]:
    """Other values of a setting of this type, near the present one."""
    origin = get_origin(hint)
    if hint == Layer:
        return [layer for layer in (info.at_depth(share) for share in (1 / 4, 1 / 2, 3 / 4)) if layer != value]
    if origin in (typing.Union, types.UnionType):
        arms = [arm for arm in get_args(hint) if arm is not type(None)]
        return _others(arms[0], value, info) if value is not None and len(arms) == 1 else []
    if origin is Literal:
        return [other for other in get_args(hint) if other != value]
    if hint is bool:
        return [not value]
    bounds = Between()
    if origin is Annotated:
        inner, *extra = get_args(hint)
        bounds = next((e for e in extra if isinstance(e, Between)), bounds)
        hint = inner
    if hint not in (int, float) or isinstance(value, bool):
        return []
    return _near(hint, value, bounds)


def _near(kind: type, value: float, bounds: Between) -> list[Any]:
    """Half and twice a number, within its bounds; where it is 0 or at a bound, the middle of them."""
    least = -math.inf if bounds.least is None else bounds.least
    most = math.inf if bounds.most is None else bounds.most
    found = [kind(value / 2), kind(value * 2)]
    if math.isfinite(least) and math.isfinite(most):
        found.append(kind((value + least) / 2))
        found.append(kind((value + most) / 2))
    return [other for other in dict.fromkeys(found) if other != value and least <= other <= most]
