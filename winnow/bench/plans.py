"""Cells: which plan a method or a baseline is at a nominal budget.

A nominal budget is content tokens left after the method's last step. What a layer reads is measured, never assumed:
the x-axis of every comparison is the mean of that over layers.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from winnow.bench.baselines import BASELINES, LABELS, OF_CLIPS, PER_QUESTION, baseline_plan
from winnow.bench.schema import Cell
from winnow.core.budget import Budget
from winnow.core.errors import WinnowError
from winnow.core.plan import FULL, Plan
from winnow.core.plan_file import names_file
from winnow.core.registry import method_class

Keep = int | float | str


@dataclass(frozen=True)
class Job:
    """A cell to be measured, and how.

    Attributes:
        baseline: its name, for baselines that choose per question.
        fed: embeddings of the picture that the untouched model is given (native-M); None: the whole picture.
        show: of a task's `shows`, for baselines that show less; "" shows all.
    """

    cell: Cell
    plan: Plan
    baseline: str = ""
    fed: int | None = None
    show: str = ""

    @property
    def key(self) -> str:
        return self.cell.plan


FULL_JOB = Job(Cell("baseline:full", "full", "baseline", "", None), Plan(()))


def jobs(
    methods: Sequence[str],
    budgets: Sequence[Keep],
    content: int,
    *,
    baselines: Sequence[str] = BASELINES,
    positions: str | None = None,
    shows: Iterable[str] = (),
) -> list[Job]:
    """The full model, then baselines and methods at every budget, largest first.

    Args:
        methods: slugs, to which budgets apply (where a method takes none, it is measured once, as it is), or plan
            strings and plan files, which have their own settings.
        content: content tokens of a typical item; shares and stepwise methods are made from it.
        baselines: of `BASELINES` and, for clips, `OF_CLIPS`; random-M and downsample-M are always measured.
        shows: baselines that show less, always measured.
    """
    known = (*BASELINES, *OF_CLIPS)
    unknown = [name for name in baselines if name not in known]
    if unknown:
        raise WinnowError(f"Unknown baseline {', '.join(unknown)}; baselines are {', '.join(known)}.")
    if not methods:
        raise WinnowError("No method was named; `winnow methods` lists them.")
    names = [name for name in known if name in {*baselines, "random", "downsample"}]
    counts = {str(b): Budget(_number(b)).of(content) for b in budgets}
    ordered = sorted(counts, key=lambda b: -counts[b])
    found = [FULL_JOB]
    found += [Job(Cell(f"baseline:{show}", show, "baseline", "", None), Plan(()), show=show) for show in shows]
    for name in names:
        for budget in ordered:
            m = counts[budget]
            cell = Cell(f"baseline:{name}:{budget}", LABELS.get(name, name), "baseline", budget, m)
            found.append(Job(cell, baseline_plan(name, m), name if name in PER_QUESTION else ""))
    for method in methods:
        found += _of_method(method.strip(), ordered, content, positions)
    keys = [job.key for job in found]
    twice = sorted({key for key in keys if keys.count(key) > 1})
    if twice:
        raise WinnowError(f"{', '.join(twice)} would be measured twice; name each method and each budget once.")
    return found


def _of_method(method: str, budgets: Sequence[str], content: int, positions: str | None) -> list[Job]:
    if any(mark in method for mark in ":+|") or method == FULL or names_file(method):
        plan = Plan.of(method, positions=positions)
        if not plan.methods:
            raise WinnowError("The full model is always measured; do not name it among the methods.")
        return [Job(Cell(plan.key, str(plan), "method", "", None), plan)]
    kind = method_class(method)
    if not kind.takes_budgets():
        plan = Plan.of(kind.configured(), positions=positions)
        return [Job(Cell(plan.key, method, "method", "", None), plan)]
    return [_at(method, budget, content, positions) for budget in budgets]


def _at(slug: str, budget: str, content: int, positions: str | None) -> Job:
    wanted = Budget(_number(budget))
    method = method_class(slug).configured().at_budget(wanted, content)
    plan = Plan.of(method, positions=positions)
    keep = wanted.rounded(method.rounding).of(content)  # a share, by the method's own rule
    return Job(Cell(plan.key, slug, "method", budget, keep), plan)


def _number(text: Keep) -> Keep:
    """A count, where the budget is one; shares stay as they were written."""
    return int(text) if isinstance(text, str) and text.strip().isdecimal() else text
