"""check_method: what every method must hold, with no model at hand."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from winnow.core.budget import Budget
from winnow.core.info import ModelInfo
from winnow.core.kv_method import CacheMethod
from winnow.core.method import Method
from winnow.core.plan import Plan
from winnow.core.point import AHEAD
from winnow.core.reduction import Reduction
from winnow.core.step import Step
from winnow.core.view import View
from winnow.testing.cache_checks import CACHE_CHECKS
from winnow.testing.input_checks import INPUT_CHECKS, NATIVE
from winnow.testing.largest import Largest
from winnow.testing.pictures import PICTURES, WITH_CLS, WITHOUT_CLS, Picture
from winnow.testing.subject import Act, Subject, emitted, expect, run


def check_registration(subject: Subject) -> None:
    """It has a slug, a summary of one line, and settings that a plan string carries there and back."""
    kind = subject.kind
    expect(bool(kind.slug), f"{kind.__name__} has no slug: decorate it with @register")
    summary = (kind.__doc__ or "").strip().split("\n")[0]
    expect(
        10 <= len(summary) <= 110,
        f"the docstring of {kind.__name__} must start with a summary in one line, got {summary!r}",
    )
    for settings in ({}, kind.identity or {}):
        plan = Plan((subject.method(**settings),))
        for text in (str(plan), plan.key):
            expect(Plan.of(text) == plan, f"{text!r} reads back as {Plan.of(text)}")


def check_counts(subject: Subject) -> None:
    """The first step keeps exactly what the budget says, of any number of tokens; later ones no more than there are.

    Only a method that takes no budget may keep nothing in its first step.
    """
    least = int(subject.kind.takes_budgets())
    for picture in PICTURES:
        v = picture.lm.n_content
        budgets = (1, 2, 3, max(1, v // 2), v, v + 7, 0.001, 0.3, "50%", "100%") if subject.has_keep else (None,)
        for keep in budgets:
            for act in subject.acts(**({} if keep is None else {"keep": keep})):
                step = act.step
                for left in {None} if step.at.name in ("features", "blocks") else {None, max(1, v // 2)}:
                    view = subject.view(act, picture, left=left)
                    found = run(step, view)
                    where = f"{subject.kind.slug} at {step.at}, {picture.name}, keep={keep}, {view.n} tokens"
                    check_form(found, view, where)
                    if act.number == 0 and found is not None:
                        known = found.counts is None and found.m >= least
                        expect(known, f"{where}: counts {found.counts}, m {found.m}")
                        if keep is not None:
                            want = min(view.n, Budget(keep, rounding=subject.kind.rounding).of(v))
                            expect(found.m == want, f"{where}: {found.m} rows, promised {want}")


def check_form(found: Reduction | None, view: View, where: str = "") -> None:
    """A map fits its view: lanes, index type and range; nothing kept twice; in order unless it says otherwise."""
    if found is None:
        return
    expect(found.n == view.n and tuple(found.lanes) == (view.b,), f"{where}: n {found.n}, lanes {tuple(found.lanes)}")
    expect(found.m <= view.n, f"{where}: {found.m} rows from {view.n} tokens")
    expect(
        found.representatives.shape == (view.b, found.m),
        f"{where}: representatives of shape {tuple(found.representatives.shape)}",
    )
    for i in range(view.b):
        lane = found.lane(i)
        expect(lane.representatives.dtype == torch.int64, f"{where}: representatives are {lane.representatives.dtype}")
        if wrong := _wrong_lane(lane, view.n):
            expect(False, f"{where}: {wrong}")


def _wrong_lane(lane: Reduction, n: int) -> str:
    """What is wrong with the map of one item; "" is nothing."""
    representatives = lane.representatives.tolist()
    if not all(0 <= a < n for a in representatives):
        return f"a representative is out of range: {representatives}"
    if len(set(representatives)) < len(representatives):
        return f"a representative comes twice: {representatives}"
    if lane.ordered and representatives != sorted(representatives):
        return f"'ordered', but representatives are {representatives}"
    matrix = lane.to_matrix()
    if not bool(matrix.isfinite().all()):
        return "weights are not finite"
    return "" if bool((matrix != 0).any(-1).all()) else "a row has no source"


def check_broken(subject: Subject) -> None:
    """NaN where a step looks is counted, and no such token is selected while others remain."""
    bad = torch.tensor([1, 4, 9])
    for step, view in _views(subject, keep=3):
        if view.n < 4 * len(bad):
            continue
        where = f"{subject.kind.slug} at {step.at} with NaN"
        spoilt = _mapped(view, lambda x: x if x.ndim == 1 else x.index_fill(1, bad, torch.nan))
        found = run(step, spoilt)
        check_form(found, spoilt, where)
        if not any(x.ndim > 1 for x in view.signals.values()) and _equal(found, run(step, view)):
            continue  # it does not look at tokens
        expect(int(spoilt.notes.get("nan_scores", 0)) > 0, f"{where}: not counted in notes['nan_scores']")
        if found is not None and found.is_selection and found.m <= view.n - len(bad):
            expect(not torch.isin(found.index, bad).any(), f"{where}: such a token was kept: {found.index}")  # type: ignore[arg-type]


def check_flat(subject: Subject) -> None:
    """Equal scores, and scores that are all −inf, give a proper map, the same twice and the same for every item."""
    for value in (1.0, -torch.inf):
        for step, view in _views(subject, keep=3):
            flat = replace(
                view,
                tokens=torch.ones_like(view.tokens),
                signals={s: torch.full_like(x, 1.0 if x.ndim == 3 else value) for s, x in view.signals.items()},
                ids=view.ids[:1].expand(view.b, -1),
            )
            where = f"{subject.kind.slug} at {step.at} with all scores {value}"
            found = run(step, flat)
            check_form(found, flat, where)
            _same(found, run(step, flat), f"{where}: two runs")
            if found is not None:
                _same(found.lane(0), found.lane(1), f"{where}: two equal items")


def check_pure(subject: Subject) -> None:
    """A step gives the same map twice, changes none of its inputs, and leaves the global generator alone."""
    for step, view in _views(subject, keep=3):
        where = f"{subject.kind.slug} at {step.at}"
        before = _mapped(view, Tensor.clone)
        state = torch.random.get_rng_state()
        found = run(step, view)
        expect(torch.equal(state, torch.random.get_rng_state()), f"{where} used the global random generator")
        for x, y in zip(_tensors(view), _tensors(before), strict=True):
            expect(torch.equal(x, y), f"{where} changed its inputs")
        _same(found, run(step, before), f"{where}: two runs")


def check_dtypes(subject: Subject) -> None:
    """Half precision gives what the same numbers give in fp32; fp64 is taken as it is."""
    for dtype in (torch.bfloat16, torch.float16, torch.float64):
        for step, view in _views(subject, keep=3):
            given = _mapped(view, partial(Tensor.to, dtype=dtype))
            found = run(step, given)
            check_form(found, given, f"{subject.kind.slug} at {step.at} in {dtype}")
            if dtype != torch.float64:
                same = _mapped(given, Tensor.float)
                _same(found, run(step, same), f"{subject.kind.slug} at {step.at}: {dtype} and fp32")


def check_memory_format(subject: Subject) -> None:
    """Strided and expanded inputs give what contiguous ones give."""
    for step, view in _views(subject, keep=3):
        where = f"{subject.kind.slug} at {step.at}"
        strided = _mapped(view, lambda x: torch.stack([x, x + 1], -1)[..., 0])
        _same(run(step, view), run(step, strided), f"{where}: strided inputs")
        wide = _mapped(view, lambda x: x[:1].expand(2, *x.shape[1:]), ids=True)
        flat = _mapped(wide, Tensor.contiguous, ids=True)
        _same(run(step, flat), run(step, wide), f"{where}: expanded inputs")


def check_batch(subject: Subject) -> None:
    """A batch gives exactly what its items give alone."""
    for step, view in _views(subject, keep=3, b=3):
        found = run(step, view)
        for i in range(view.b):
            alone = run(step, _mapped(view, partial(torch.narrow, dim=0, start=i, length=1), ids=True))
            lane = None if found is None else found.lane(i)
            if alone is None:
                kept_all = lane is None or (lane.is_selection and lane.m == view.n)
                expect(kept_all, f"{subject.kind.slug} at {step.at}: item {i} changes in a batch only")
            elif lane is not None:
                _same(lane, alone.lane(0), f"{subject.kind.slug} at {step.at}: item {i} of a batch and alone")
                _same_tokens(step, view, i)


def _same_tokens(step: Step, view: View, i: int) -> None:
    """New tokens of an item do not stand on what else is in the batch; products of another size round otherwise."""
    together = emitted(step, view)
    alone = emitted(step, _mapped(view, partial(torch.narrow, dim=0, start=i, length=1), ids=True))
    if together is not None and alone is not None:
        off = (together[i, : alone.shape[1]] - alone[0]).abs().max()
        expect(float(off) <= 1e-4 * (1 + float(alone.abs().max())), f"new tokens at {step.at}: item {i} is {off} off")


def check_identity(subject: Subject) -> None:
    """At its identity settings every step gives the identity map, by the ordinary way."""
    if subject.kind.identity is None:
        return
    for step, view in _views(subject, **subject.kind.identity):
        expect(emitted(step, view) is None, f"{subject.kind.slug} at {step.at}: new tokens at its identity settings")
        found = run(step, view)
        if found is not None:
            everything = torch.arange(view.n).expand(view.b, -1)
            same = found.is_selection and found.ordered and torch.equal(found.index, everything)  # type: ignore[arg-type]
            expect(same, f"{subject.kind.slug} at {step.at}: not the identity at {subject.kind.identity}: {found}")


def check_memory(subject: Subject) -> None:
    """Nothing of V × V is made, unless the method declares it."""
    if subject.kind.pairwise:
        return
    for act in subject.acts(**({"keep": 8} if subject.has_keep else {})):
        small, large = (_largest(subject, act, Picture.grid(20, wide)) for wide in (20, 40))
        expect(
            small < 400**2 // 2 or large < 3 * small,  # what is linear in the tokens may be wide
            f"{subject.kind.slug} at {act.step.at}: not declared pairwise, {small} elements for 400 tokens, "
            f"{large} for twice as many",
        )


def _largest(subject: Subject, act: Act, picture: Picture) -> int:
    """Elements of the largest tensor that a step makes."""
    view = subject.view(act, picture, b=1)
    with Largest() as seen:
        run(act.step, view)
    return seen.elements


CHECKS: tuple[Callable[[Subject], None], ...] = (
    check_registration,
    check_counts,
    check_broken,
    check_flat,
    check_pure,
    check_dtypes,
    check_memory_format,
    check_batch,
    check_identity,
    check_memory,
)


def check_method(
    kind: type[Method],
    *,
    settings: Mapping[str, Any] | None = None,
    infos: Sequence[ModelInfo] | None = None,
) -> None:
    """Run every check on a method; the first that fails raises AssertionError. See `Subject` for the arguments."""
    given = ((NATIVE,) if _ahead(kind) else (WITH_CLS, WITHOUT_CLS)) if infos is None else tuple(infos)
    subject = Subject(kind, settings or {}, given)
    for check in checks_of(kind):
        check(subject)


def checks_of(kind: type[Method]) -> tuple[Callable[[Subject], None], ...]:
    """The checks that a method must pass: of the tokens of pictures, of the cache, or ahead of the processor."""
    if issubclass(kind, CacheMethod):
        return (check_registration, *CACHE_CHECKS)
    return (check_registration, *INPUT_CHECKS) if _ahead(kind) else CHECKS


def _ahead(kind: type[Method]) -> bool:
    """Whether a method acts ahead of the processor alone."""
    return kind.at in AHEAD and not issubclass(kind, CacheMethod)


def _views(subject: Subject, b: int = 2, **settings: Any) -> Iterator[tuple[Step, View]]:
    if not subject.has_keep:
        settings.pop("keep", None)
    for act in subject.acts(**settings):
        for picture in PICTURES[1:]:
            yield act.step, subject.view(act, picture, b=b)


def _tensors(view: View) -> list[Tensor]:
    return [view.tokens, view.ids, *view.signals.values()]


def _mapped(view: View, change: Callable[[Tensor], Tensor], ids: bool = False) -> View:
    """The view with its tokens and signals changed, and with notes of its own."""
    signals = {signal: change(x) for signal, x in view.signals.items()}
    return replace(
        view, tokens=change(view.tokens), signals=signals, ids=change(view.ids) if ids else view.ids.clone(), notes={}
    )


def _same(a: Reduction | None, b: Reduction | None, what: str) -> None:
    if not _equal(a, b):  # writing maps down takes longer than comparing them
        expect(False, f"{what} differ: {a} and {b}")


def _equal(a: Reduction | None, b: Reduction | None) -> bool:
    if a is None or b is None:
        return a is b
    pairs = [(getattr(a, f.name), getattr(b, f.name)) for f in dataclasses.fields(Reduction)]
    return all(
        torch.equal(x, y) if isinstance(x, Tensor) and isinstance(y, Tensor) else x is y or x == y for x, y in pairs
    )
