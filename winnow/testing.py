"""Checks that every method must pass, with no model at hand: for the methods of this package and for plug-ins.

    from winnow.testing import check_method, run_step
    check_method(MyMethod)                      # raises AssertionError with what was expected and what came
    run_step(MyMethod(keep=8), tokens=x, signals=attention).kept      # one step on plain arrays

Views with random signals are made from what the method's own steps ask for; a signal of your own says with `sample`
what its values look like.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from winnow.core.budget import Budget
from winnow.core.errors import UnsupportedError, WinnowError
from winnow.core.info import ModelInfo
from winnow.core.layout import Layout, cls_token, grid_rows
from winnow.core.method import Method
from winnow.core.plan import Plan
from winnow.core.reduction import Reduction
from winnow.core.signal import Signal
from winnow.core.step import Keep, Reduce, State, Step
from winnow.core.view import View

WITH_CLS = ModelInfo("a model with [CLS]", "llava", depth=8, width=32, vision_depth=12, feature_layer=-2, has_cls=True)
WITHOUT_CLS = ModelInfo(
    "a model without [CLS]",
    "qwen2_5_vl",
    depth=8,
    width=32,
    vision_depth=8,
    has_cls=False,
    points=("projected", "layers"),
    mrope=True,
    merge=2,
)


@dataclass(frozen=True)
class Picture:
    """One picture as the tower sees it (tile by tile, [CLS] before each) and as it enters the LM."""

    name: str
    tower: Layout
    lm: Layout

    @staticmethod
    def grid(h: int, w: int) -> Picture:
        """A single tile."""
        return Picture(f"{h}x{w}", Layout.grid(h, w, cls=True), Layout.grid(h, w))

    @staticmethod
    def tiled(side: int, rows: int, cols: int) -> Picture:
        """A thumbnail and a mosaic of rows × cols tiles, with a newline after each mosaic row."""
        key, cells = ("tiled", side, rows, cols), side * side
        line, col = np.meshgrid(np.arange(rows * side), np.arange(cols * side), indexing="ij")
        tile = 1 + line // side * cols + col // side
        cell = tile * cells + line % side * side + col % side
        mosaic = grid_rows(rows * side, cols * side, grid=1, tile=tile[None], cell=cell[None], newline=True)
        lm = Layout.of(key, [grid_rows(side, side), mosaic])
        parts = [cls_token(), grid_rows(side, side)]
        for t in range(rows * cols):
            crop = grid_rows(side, side, grid=1, tile=t + 1, cell=(t + 1) * cells + np.arange(cells))
            crop["place"] += np.array([0, 0, t // cols * side, t % cols * side])
            parts += [cls_token(), crop]
        return Picture(f"tiled{side}-{rows}x{cols}", Layout.of((*key, "tower"), parts), lm)


PICTURES = (Picture.grid(1, 1), Picture.grid(1, 7), Picture.grid(6, 5), Picture.tiled(4, 2, 1))


@dataclass(frozen=True)
class Act:
    """A step under test: its number in the method, the width of its tokens, and what the method's `build` made."""

    number: int
    step: Step
    width: int
    module: Any = None


@dataclass(frozen=True)
class Subject:
    """A method under test.

    Args:
        kind: its class.
        settings: those that it needs beside its defaults.
        infos: models to try; those that it does not support are left out, and one must remain.
    """

    kind: type[Method]
    settings: Mapping[str, Any] = field(default_factory=dict)
    infos: tuple[ModelInfo, ...] = (WITH_CLS, WITHOUT_CLS)

    def method(self, **settings: Any) -> Method:
        return self.kind.configured(**{**self.settings, **settings})

    @property
    def has_keep(self) -> bool:
        return "keep" in self.kind.settings()

    def acts(self, **settings: Any) -> Iterator[Act]:
        """The steps of the method on each model that supports it."""
        method, supported = self.method(**settings), 0
        for info in self.infos:
            try:
                resolved, steps = method.bind(info)
            except UnsupportedError:
                continue
            supported += 1
            module = resolved.build(info)
            yield from (Act(number, step, info.width, module) for number, step in enumerate(steps))
        _expect(supported > 0, f"{self.kind.__name__} runs on none of {[info.model for info in self.infos]}")

    def view(self, act: Act, picture: Picture, *, b: int = 2, left: int | None = None, seed: int = 0) -> View:
        """A view with random tokens and signals; `left`: tokens that an earlier method has left over, at random."""
        step = act.step
        generator = torch.Generator().manual_seed(seed)
        inside = step.at.name in ("features", "blocks")
        layout = picture.tower if inside else picture.lm
        n = layout.n if inside else layout.n_content if left is None else left
        # At the tower's side a signal has values for all tokens, [CLS] included, or for the patches alone.
        per_token = lambda signal: layout.n_content if inside and not signal.covers_prefix else n  # noqa: E731
        signals = step.signals(lambda signal: signal.sample(generator, b, per_token(signal)))
        ids = torch.stack(
            [torch.randperm(layout.n if inside else layout.n_content, generator=generator)[:n] for _ in range(b)]
        )
        tokens = torch.randn(b, n, act.width, generator=generator)
        return View(tokens, layout, ids.sort(1).values, picture.lm.n_content, signals, seed=seed, module=act.module)


def run(step: Step, view: View, state: State | None = None) -> Reduction | None:
    """What a step asks for: its map, or None if it only looked."""
    action, _ = step.act(view, state or State())
    if isinstance(action, Keep):
        return None
    _expect(isinstance(action, Reduce), f"these checks know Reduce and Keep, not {type(action).__name__}")
    return action.reduction  # type: ignore[attr-defined]


@dataclass(frozen=True, eq=False)
class StepResult:
    """What one step did to plain arrays.

    Attributes:
        kept: for each item, `[m]` the ids of what is left (a merged token: its representative).
        rows: for each item, `[m, D]` the tokens that are left.
        state: what the method remembers from now on.
        reduction: the map, with a leading lane for each item; None where the step only looked.
        notes: what it recorded.
    """

    kept: list[Tensor]
    rows: list[Tensor]
    state: State
    reduction: Reduction | None
    notes: dict[str, Any]


def run_step(
    method: Method | str,
    info: ModelInfo = WITH_CLS,
    tokens: Tensor | None = None,
    signals: Tensor | Sequence[Tensor] | Mapping[Signal, Tensor] = (),
    layout: Layout | None = None,
    *,
    step: int = 0,
    ids: Tensor | None = None,
    n_visual: int | None = None,
    n_lm: int = 0,
    state: State | None = None,
    seed: int = 0,
) -> StepResult:
    """Run one step of a method on plain arrays, with no model and nothing of the engine's insides.

    Args:
        method: a method, or a plan string of one.
        info: of the model that it is to believe in.
        tokens: `[b, N, D]`.
        signals: the values of what the step looks at: one tensor for all, a sequence in the order of the step's
            `needs`, or by signal.
        layout: of an item; default: a row of N tokens.
        step: which of the method's steps, in the order in which it lists them.
        ids: `[b, N]` which token of the layout each one is; default: all, in order.
        n_visual, n_lm: content tokens of the item at entry, and on entering the LM; default: those of the layout.
        state: what an earlier step returned.

    Raises:
        WinnowError: the method cannot run on such a model, or something is missing.
    """
    if isinstance(method, str):
        plan = Plan.of(method)
        if len(plan.methods) != 1:
            raise WinnowError(f"run_step takes one method, got the plan {method!r} with {len(plan.methods)}.")
        method = plan.methods[0]
    if tokens is None or tokens.ndim != 3:
        raise WinnowError("run_step takes tokens of shape [b, N, D].")
    resolved, steps = method.bind(info)
    if not 0 <= step < len(steps):
        raise WinnowError(f"{method.slug} has steps 0 … {len(steps) - 1} on {info.model}; got step={step}.")
    acts = steps[step]
    view = View.of(tokens, layout=layout, n_visual=n_visual, n_lm=n_lm, seed=seed)
    view = replace(
        view,
        ids=view.ids if ids is None else ids,
        signals=acts.signals(_given(acts, signals)),
        module=resolved.build(info),
    )
    action, after = acts.act(view, state or State())
    if isinstance(action, Keep):
        return StepResult(list(view.ids), list(tokens), after, None, view.notes)
    if not isinstance(action, Reduce):
        raise WinnowError(f"run_step knows Reduce and Keep; {method.slug} asks for {type(action).__name__}.")
    made, lanes = action.reduction.apply(tokens), [action.reduction.lane(i) for i in range(view.b)]
    kept = [own[lane.anchors] for own, lane in zip(view.ids, lanes, strict=True)]
    rows = [own[: lane.m] for own, lane in zip(made, lanes, strict=True)]
    return StepResult(kept, rows, after, action.reduction, view.notes)


def _given(step: Step, signals: Any) -> Callable[[Signal], Tensor]:
    """The value of each signal of a step, however they were given."""
    if isinstance(signals, Tensor):
        return lambda signal: signals
    if isinstance(signals, Mapping):
        names = {signal: name for name, signal in step.names if name in signals}
        wanted = {signal: names.get(signal, signal) for signal in step.needs}
        found = {signal: signals[name] for signal, name in wanted.items() if name in signals}
    else:
        found = dict(zip(step.needs, signals, strict=False))
    missing = [str(signal) for signal in step.needs if signal not in found]
    if missing:
        raise WinnowError(f"the step at {step.at} looks at {', '.join(missing)}: give its values.")
    return found.__getitem__


def check_registration(subject: Subject) -> None:
    """It has a slug, a summary of one line, and settings that a plan string carries there and back."""
    kind = subject.kind
    _expect(bool(kind.slug), f"{kind.__name__} has no slug: decorate it with @register")
    summary = (kind.__doc__ or "").strip().split("\n")[0]
    _expect(
        10 <= len(summary) <= 110,
        f"the docstring of {kind.__name__} must start with a summary in one line, got {summary!r}",
    )
    for settings in ({}, kind.identity or {}):
        plan = Plan((subject.method(**settings),))
        for text in (str(plan), plan.key):
            _expect(Plan.of(text) == plan, f"{text!r} reads back as {Plan.of(text)}")


def check_counts(subject: Subject) -> None:
    """The first step keeps exactly what the budget says, of any number of tokens; later ones no more than there are."""
    for picture in PICTURES:
        v = picture.lm.n_content
        budgets = (1, 2, 3, max(1, v // 2), v, v + 7, 0.001, 0.3, "50%", "100%") if subject.has_keep else (None,)
        for keep in budgets:
            for act in subject.acts(**({} if keep is None else {"keep": keep})):
                step = act.step
                for left in {None} if step.at.name == "features" else {None, max(1, v // 2)}:
                    view = subject.view(act, picture, left=left)
                    found = run(step, view)
                    where = f"{subject.kind.slug} at {step.at}, {picture.name}, keep={keep}, {view.n} tokens"
                    check_form(found, view, where)
                    if act.number == 0 and found is not None:
                        _expect(found.counts is None and found.m >= 1, f"{where}: counts {found.counts}, m {found.m}")
                        if keep is not None:
                            want = min(view.n, Budget(keep, rounding=subject.kind.rounding).of(v))
                            _expect(found.m == want, f"{where}: {found.m} rows, promised {want}")


def check_form(found: Reduction | None, view: View, where: str = "") -> None:
    """A map fits its view: lanes, index type and range; nothing kept twice; in order unless it says otherwise."""
    if found is None:
        return
    _expect(found.n == view.n and tuple(found.lanes) == (view.b,), f"{where}: n {found.n}, lanes {tuple(found.lanes)}")
    _expect(found.m <= view.n, f"{where}: {found.m} rows from {view.n} tokens")
    _expect(found.anchors.shape == (view.b, found.m), f"{where}: anchors of shape {tuple(found.anchors.shape)}")
    for i in range(view.b):
        lane = found.lane(i)
        anchors = lane.anchors.tolist()
        _expect(lane.anchors.dtype == torch.int64, f"{where}: anchors are {lane.anchors.dtype}")
        _expect(all(0 <= a < view.n for a in anchors), f"{where}: an anchor is out of range: {anchors}")
        _expect(len(set(anchors)) == len(anchors), f"{where}: an anchor comes twice: {anchors}")
        _expect(not lane.ordered or anchors == sorted(anchors), f"{where}: 'ordered', but anchors are {anchors}")
        _expect(bool(lane.to_matrix().isfinite().all()), f"{where}: weights are not finite")
        _expect(bool((lane.to_matrix() != 0).any(-1).all()), f"{where}: a row has no source")


def check_broken(subject: Subject) -> None:
    """NaN where a step looks is counted, and no such token is selected while others remain."""
    bad = torch.tensor([0, 4, 9])
    for step, view in _views(subject, keep=3):
        if view.n < 4 * len(bad):
            continue
        where = f"{subject.kind.slug} at {step.at} with NaN"
        spoilt = _mapped(view, lambda x: x if x.ndim == 1 else x.index_fill(1, bad, torch.nan))
        found = run(step, spoilt)
        check_form(found, spoilt, where)
        if not any(x.ndim > 1 for x in view.signals.values()) and _equal(found, run(step, view)):
            continue  # it does not look at tokens
        _expect(int(spoilt.notes.get("nan_scores", 0)) > 0, f"{where}: not counted in notes['nan_scores']")
        if found is not None and found.is_selection and found.m <= view.n - len(bad):
            _expect(not torch.isin(found.index, bad).any(), f"{where}: such a token was kept: {found.index}")  # type: ignore[arg-type]


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
        _expect(torch.equal(state, torch.random.get_rng_state()), f"{where} used the global random generator")
        for x, y in zip(_tensors(view), _tensors(before), strict=True):
            _expect(torch.equal(x, y), f"{where} changed its inputs")
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
                _expect(kept_all, f"{subject.kind.slug} at {step.at}: item {i} changes in a batch only")
            elif lane is not None:
                _same(lane, alone.lane(0), f"{subject.kind.slug} at {step.at}: item {i} of a batch and alone")


def check_identity(subject: Subject) -> None:
    """At its identity settings every step gives the identity map, by the ordinary way."""
    if subject.kind.identity is None:
        return
    for step, view in _views(subject, **subject.kind.identity):
        found = run(step, view)
        if found is not None:
            everything = torch.arange(view.n).expand(view.b, -1)
            same = found.is_selection and found.ordered and torch.equal(found.index, everything)  # type: ignore[arg-type]
            _expect(same, f"{subject.kind.slug} at {step.at}: not the identity at {subject.kind.identity}: {found}")


def check_memory(subject: Subject) -> None:
    """Nothing of V × V is made, unless the method declares it."""
    if subject.kind.pairwise:
        return
    picture = Picture.grid(20, 20)
    for act in subject.acts(**({"keep": 8} if subject.has_keep else {})):
        step, view = act.step, subject.view(act, picture, b=1)
        with _Largest() as seen:
            run(step, view)
        _expect(
            seen.elements < view.n**2 // 2,
            f"{subject.kind.slug} at {step.at}: not declared pairwise, {seen.elements} elements for {view.n} tokens",
        )


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
    infos: Sequence[ModelInfo] = (WITH_CLS, WITHOUT_CLS),
) -> None:
    """Run every check on a method; the first that fails raises AssertionError. See `Subject` for the arguments."""
    subject = Subject(kind, settings or {}, tuple(infos))
    for check in CHECKS:
        check(subject)


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
    _expect(_equal(a, b), f"{what} differ: {a} and {b}")


def _equal(a: Reduction | None, b: Reduction | None) -> bool:
    if a is None or b is None:
        return a is b
    pairs = [(getattr(a, f.name), getattr(b, f.name)) for f in dataclasses.fields(Reduction)]
    return all(
        torch.equal(x, y) if isinstance(x, Tensor) and isinstance(y, Tensor) else x is y or x == y for x, y in pairs
    )


def _expect(condition: bool, message: str) -> None:
    if not condition:
        raise AssertionError(message)


class _Largest(TorchDispatchMode):
    """Elements of the largest tensor that any operation returned."""

    elements = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for x in out if isinstance(out, tuple | list) else (out,):
            if isinstance(x, Tensor) and x.untyped_storage().nbytes() >= x.numel():  # an expanded view is not memory
                self.elements = max(self.elements, x.numel())
        return out
