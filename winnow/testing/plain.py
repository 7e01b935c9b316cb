"""run_step: one step of a method on plain arrays, with no model and nothing of the engine's insides."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor

from winnow.core.errors import WinnowError
from winnow.core.info import ModelInfo
from winnow.core.layout import Layout
from winnow.core.method import Method
from winnow.core.plan import Plan
from winnow.core.reduction import Reduction
from winnow.core.signal import Signal
from winnow.core.step import Emit, Observe, Reduce, State, Step
from winnow.core.view import View
from winnow.testing.pictures import WITH_CLS


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
    if isinstance(action, Observe):
        return StepResult(list(view.ids), list(tokens), after, None, view.notes)
    match action:
        case Reduce(reduction=reduction):
            made = reduction.apply(tokens)
        case Emit(tokens=made, provenance=Reduction() as reduction):
            pass
        case _:
            asked = f"{method.slug} asks for {type(action).__name__}"
            raise WinnowError(f"run_step knows Reduce, Observe, and Emit with a provenance; {asked}.")
    lanes = [reduction.lane(i) for i in range(view.b)]
    kept = [own[lane.representatives] for own, lane in zip(view.ids, lanes, strict=True)]
    rows = [own[: lane.m] for own, lane in zip(made, lanes, strict=True)]
    return StepResult(kept, rows, after, reduction, view.notes)


def _given(step: Step, signals: Any) -> Callable[[Signal], Tensor]:
    """The value of each signal of a step, however they were given."""
    if isinstance(signals, Tensor):
        return lambda signal: signals
    if isinstance(signals, Mapping):
        names = {signal: name for name, signal in step.names if name in signals}
        found = {
            signal: signals[names.get(signal, signal)] for signal in step.needs if names.get(signal, signal) in signals
        }
    else:
        found = dict(zip(step.needs, signals, strict=False))
    missing = [str(signal) for signal in step.needs if signal not in found]
    if missing:
        raise WinnowError(f"the step at {step.at} looks at {', '.join(missing)}: give its values.")
    return found.__getitem__
