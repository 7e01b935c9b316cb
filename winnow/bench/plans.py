"""Cells: which plan a method or a baseline is at a nominal budget.

A nominal budget is content tokens left after the method's last step. What a layer reads is measured, never assumed:
the x-axis of every comparison is the mean of that over layers.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from winnow.bench.baselines import BASELINES, LABELS, PER_QUESTION, baseline_plan
from winnow.core.budget import Budget
from winnow.core.errors import UnsupportedError, WinnowError
from winnow.core.plan import FULL, Plan
from winnow.core.registry import method_class

Keep = int | float | str


@dataclass(frozen=True)
class Job:
    """A cell to be measured.

    Attributes:
        key: the plan's key, or `baseline:<name>:<budget>`.
        keep: content tokens that the budget means, where that is known.
        baseline: its name, for baselines that choose per question.
    """

    key: str
    label: str
    kind: str
    budget: str
    keep: int | None
    plan: Plan
    baseline: str = ""


FULL_JOB = Job("baseline:full", "full", "baseline", "", None, Plan(()))


def _pyramid(m: int, content: int) -> dict[str, Any]:
    """Equal steps down to M: at 12.5 % these are the published 50 %, 25 %, 12.5 %."""
    share = m / content
    return {"ratios": tuple(f"{100 * share ** (cut / 3):.4f}%" for cut in (1, 2, 3))}


# Methods without a `keep` of their own: settings for M of the item's content tokens.
AT_BUDGET: dict[str, Callable[[int, int], dict[str, Any]]] = {"pyramiddrop": _pyramid}


def jobs(
    methods: Sequence[str],
    budgets: Sequence[Keep],
    content: int,
    *,
    baselines: Sequence[str] = BASELINES,
    positions: str | None = None,
) -> list[Job]:
    """The full model, then baselines and methods at every budget, largest first.

    Args:
        methods: slugs, to which budgets apply, or plan strings, which have their own settings.
        content: content tokens of a typical item; shares and stepwise methods are made from it.
        baselines: of `BASELINES`; random-M and downsample-M are always measured.
    """
    unknown = [name for name in baselines if name not in BASELINES]
    if unknown:
        raise WinnowError(f"Unknown baseline {', '.join(unknown)}; baselines are {', '.join(BASELINES)}.")
    if not methods:
        raise WinnowError("No method was named; `winnow methods` lists them.")
    names = [name for name in BASELINES if name in {*baselines, "random", "downsample"}]
    counts = {str(b): Budget(_number(b)).of(content) for b in budgets}
    ordered = sorted(counts, key=lambda b: -counts[b])
    found = [FULL_JOB]
    for name in names:
        for budget in ordered:
            plan = baseline_plan(name, counts[budget])
            found.append(
                Job(f"baseline:{name}:{budget}", LABELS.get(name, name), "baseline", budget, counts[budget], plan,
                    name if name in PER_QUESTION else "")
            )  # fmt: skip
    for method in methods:
        found += _of_method(method.strip(), ordered, counts, content, positions)
    keys = [job.key for job in found]
    twice = sorted({key for key in keys if keys.count(key) > 1})
    if twice:
        raise WinnowError(f"{', '.join(twice)} would be measured twice; name each method and each budget once.")
    return found


def _of_method(
    method: str, budgets: Sequence[str], counts: dict[str, int], content: int, positions: str | None
) -> list[Job]:
    if any(mark in method for mark in ":+|") or method == FULL:
        plan = Plan.of(method, positions=positions)
        if not plan.methods:
            raise WinnowError("The full model is always measured; do not name it among the methods.")
        return [Job(plan.key, str(plan), "method", "", None, plan)]
    return [_at(method, budget, counts[budget], content, positions) for budget in budgets]


def _at(slug: str, budget: str, m: int, content: int, positions: str | None) -> Job:
    made = method_class(slug)
    if "keep" in made.settings():
        settings: dict[str, Any] = {"keep": _number(budget)}
    elif slug in AT_BUDGET:
        settings = AT_BUDGET[slug](m, content)
    else:
        raise UnsupportedError(
            f"{slug} has no setting `keep`, so --keep says nothing to it; give it as a plan, with its own settings: "
            f"{slug}:{','.join(f'{name}=…' for name in made.settings())}"
        )
    plan = Plan.of(made.configured(**settings), positions=positions)
    return Job(plan.key, slug, "method", budget, m, plan)


def _number(text: Keep) -> Keep:
    """A count, where the budget is one; shares stay as they were written."""
    return int(text) if isinstance(text, str) and text.strip().isdecimal() else text
