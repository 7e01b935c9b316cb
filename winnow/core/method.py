"""Method: settings, and the steps that follow from them."""

from __future__ import annotations

import dataclasses
import difflib
from collections.abc import Callable
from typing import Any, ClassVar

from winnow.core.budget import Budget
from winnow.core.errors import UnsupportedError, WinnowError
from winnow.core.info import ModelInfo
from winnow.core.point import Point
from winnow.core.reduction import Reduction
from winnow.core.signal import Signal
from winnow.core.step import Reduce, State, Step
from winnow.core.view import View


class Method:
    """A frozen dataclass of settings, registered under a slug.

    A stateless one-step method defines `reduce(view)` and, if it does not act at `projected`, `at`. Its needs are its
    signals: the fields that hold a Signal, or a tuple of them. Anything else defines `steps(info)`.

    Class attributes:
        rounding: how a share of tokens becomes a count.
        identity: the settings at which the method changes nothing, or None if there are none.
        pairwise: whether it builds one V × V fp32 table for each item.
        streaming: whether it remembers something in `State.request`; its views then never join samples.
    """

    slug: ClassVar[str] = ""
    at: ClassVar[str] = "projected"
    rounding: ClassVar[str] = "half-up"
    identity: ClassVar[dict[str, Any] | None] = None
    pairwise: ClassVar[bool] = False
    streaming: ClassVar[bool] = False

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):  # type: ignore[arg-type]
            value = getattr(self, field.name)
            if field.type in ("Budget", Budget) and not isinstance(value, Budget):
                object.__setattr__(
                    self, field.name, Budget(value)
                )  # the one place where a plain number becomes a budget

    def steps(self, info: ModelInfo) -> tuple[Step, ...]:
        """What the method does on a model of this kind. Raises UnsupportedError or WinnowError if it cannot."""
        return (Step(Point.of(self.at), self._run, self.signals()),)

    def reduce(self, view: View) -> Reduction:
        """The map of a one-step method."""
        raise NotImplementedError(f"{type(self).__name__} defines neither reduce(view) nor steps(info)")

    def build(self, info: ModelInfo) -> Any:
        """Parameters of a learned method as an nn.Module; None for the others."""
        return None

    def calibrate(self, run: Callable[..., Any]) -> Method:
        """A method whose settings were fitted with `run`, which the engine supplies; itself by default."""
        return self

    def at_budget(self, budget: Budget, content: int) -> Method:
        """The same method at another budget.

        Args:
            budget: content tokens that are left after its last step, or their share.
            content: content tokens of a typical item, for methods with a schedule.

        Raises:
            UnsupportedError: the method has no budget to set.
        """
        if "keep" not in self.settings():
            raise UnsupportedError(
                f"{self.slug} has no setting `keep`, so a budget says nothing to it; give it as a plan with its own "
                f"settings: {self.slug}:{','.join(f'{name}=…' for name in self.settings())}"
            )
        return dataclasses.replace(self, keep=budget)  # type: ignore[type-var]

    def signals(self) -> tuple[Signal, ...]:
        """The signals among the settings."""
        found: list[Signal] = []
        for field in dataclasses.fields(self):  # type: ignore[arg-type]
            value = getattr(self, field.name)
            found += [s for s in (value if isinstance(value, tuple) else (value,)) if isinstance(s, Signal)]
        return tuple(found)

    def checked_steps(self, info: ModelInfo) -> tuple[Step, ...]:
        """The steps, after checking that this model has the points and the signals that they ask for."""
        steps = self.steps(info)
        for step in steps:
            if step.at.kind not in info.points:
                raise UnsupportedError(
                    f"{self.slug} acts at {step.at}, which {info.model} does not offer; "
                    f"it offers {', '.join(info.points)}."
                )
            if step.at.name == "layers":
                info.lm_layer(step.at.index)  # type: ignore[arg-type]
            for signal in step.needs:
                try:
                    signal.require(info)
                except UnsupportedError as error:
                    raise UnsupportedError(f"{self.slug} cannot run on {info.model}: {error}") from None
        return steps

    def _run(self, view: View, state: State) -> tuple[Reduce, State]:
        return Reduce(self.reduce(view)), state

    @classmethod
    def settings(cls) -> dict[str, dataclasses.Field]:
        """The settings that a plan may name: the dataclass fields that do not hold signals."""
        return {f.name: f for f in dataclasses.fields(cls) if f.metadata.get("setting", True)}  # type: ignore[arg-type]

    @classmethod
    def configured(cls, **values: Any) -> Method:
        """An instance from plain values, as a plan string or a request gives them."""
        known = cls.settings()
        for name in values:
            if name not in known:
                near = difflib.get_close_matches(name, known, 1)
                hint = f" Did you mean {near[0]!r}?" if near else ""
                raise WinnowError(f"{cls.slug} has no setting {name!r}; it has {', '.join(known) or 'none'}.{hint}")
        return cls(**values)
