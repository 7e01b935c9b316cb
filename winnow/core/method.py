"""Method: settings, and the steps that follow from them."""

import dataclasses
import difflib
from collections.abc import Callable
from typing import Any, ClassVar, Literal, Self

from torch import Tensor

from winnow.core.budget import Budget, Rounding
from winnow.core.cross_read import CrossRead
from winnow.core.errors import UnsupportedError, WinnowError
from winnow.core.info import ModelInfo
from winnow.core.point import Point
from winnow.core.reduction import Reduction
from winnow.core.select import top_k
from winnow.core.settings import checked, types_of
from winnow.core.signal import Signal
from winnow.core.step import Reduce, State, Step
from winnow.core.stretch import Stretch
from winnow.core.tiles import top_k_per_tile
from winnow.core.view import View


class Method:
    """A frozen dataclass of settings, registered under a slug.

    A method that ranks tokens defines `score(view)`; one that reduces in one step defines `reduce(view)`; anything else
    defines `steps(info)`. What it looks at are its signals: the fields that hold one, or a tuple of them. Settings are
    checked from their types.

    Class attributes:
        at: the point of a one-step method.
        per_tile: whether a method that ranks splits the budget equally over an item's tiles.
        separators: whether newlines and tile breaks stay.
        rounding: how a share of tokens becomes a count.
        identity: the settings at which the method changes nothing, or None if there are none.
        released: the settings, and the `positions` policy, under which it equals the authors' released code; None if
            no such code is known.
        pairwise: whether it builds one V × V fp32 table for each item.
        modalities: what it acts on in a model that reads several kinds of items; in one that reads none of these, it
            acts on all.
        across_frames: whether it looks across the frames of a video, which a picture has one of.
        streaming: whether it remembers something in `State.request`; its views then never join samples.
    """

    slug: ClassVar[str] = ""
    at: ClassVar[str] = "projected"
    per_tile: ClassVar[bool] = False
    separators: ClassVar[Literal["keep", "drop"]] = "keep"
    rounding: ClassVar[Rounding] = "half-up"
    identity: ClassVar[dict[str, Any] | None] = {"keep": "100%"}
    released: ClassVar[dict[str, Any] | None] = None
    pairwise: ClassVar[bool] = False
    modalities: ClassVar[tuple[str, ...]] = ("image", "video")
    across_frames: ClassVar[bool] = False
    streaming: ClassVar[bool] = False

    def __post_init__(self) -> None:
        owner = self.slug or type(self).__name__
        for name, hint in types_of(self).items():
            value = checked(owner, name, hint, getattr(self, name))
            object.__setattr__(self, name, _rounded(value, self.rounding))
        self.check()

    def check(self) -> None:
        """Raise a WinnowError where settings, each allowed by its type, do not go together."""

    def replace(self, **changes: Any) -> Self:
        """The same method with some settings changed."""
        return dataclasses.replace(self, **changes)  # type: ignore[type-var]

    def score(self, view: Any) -> Tensor:
        """`[b, N]` how much each token matters, for a method that keeps the best."""
        raise NotImplementedError(f"{type(self).__name__} defines none of score(view), reduce(view), steps(info)")

    def reduce(self, view: View) -> Reduction:
        """The map of a one-step method: by default, the tokens with the highest scores."""
        best = top_k_per_tile if self.per_tile else top_k
        return best(self.score(view), self.keep.of(view), view)  # type: ignore[attr-defined]

    def steps(self, info: ModelInfo) -> tuple[Step, ...]:
        """What the method does on a model of this kind, whose settings `resolve` has made definite.

        Raises:
            UnsupportedError, WinnowError: it cannot run there, and why.
        """
        return (Step(Point.of(self.at), self._one_step, self.signals()),)

    def _one_step(self, view: View, state: State) -> Reduce:
        return Reduce(self.reduce(view), self.separators)

    def resolve(self, info: ModelInfo) -> Self:
        """The method with settings that depend on the model made definite; by default, its signals."""
        changes: dict[str, Any] = {}
        for name in types_of(self):
            value = getattr(self, name)
            if isinstance(value, Signal):
                changes[name] = value.resolve(info)
            elif isinstance(value, tuple) and any(isinstance(v, Signal) for v in value):
                changes[name] = tuple(v.resolve(info) if isinstance(v, Signal) else v for v in value)
        return self.replace(**changes) if changes else self

    def signals(self) -> tuple[Signal, ...]:
        """The signals among the settings: what a one-step method looks at."""
        found: list[Signal] = []
        for name in types_of(self):
            value = getattr(self, name)
            found += [s for s in (value if isinstance(value, tuple) else (value,)) if isinstance(s, Signal)]
        return tuple(found)

    def stretch(self, tokens: int) -> Stretch | None:
        """How the rotary positions of a request are stretched that has so many visual tokens; None: they are not."""
        return None

    def cross_reads(self, info: ModelInfo) -> tuple[CrossRead, ...]:
        """What rows of the language model read of that which the method remembers of items; none by default."""
        return ()

    def build(self, info: ModelInfo) -> Any:
        """Parameters of a learned method as an nn.Module; None for the others."""
        return None

    def calibrate(self, run: Callable[..., Any]) -> "Method":
        """A method whose settings were fitted to a model; itself by default.

        Args:
            run: `run(method, text)` runs the language model once under a method that looks; `text` is given the ids of
                all ordinary tokens `[V]`, and gives those that are read, `[B, T]`.
        """
        return self

    @classmethod
    def takes_budgets(cls) -> bool:
        """Whether `at_budget` has something to set."""
        return "keep" in cls.settings() or cls.at_budget is not Method.at_budget

    def at_budget(self, budget: Budget | int | float | str, content: int) -> "Method":
        """The same method at another budget.

        Args:
            budget: content tokens that are left after its last step, or their share.
            content: content tokens of a typical item, for methods with a schedule.

        Raises:
            UnsupportedError: the method has no budget to set.
        """
        if "keep" not in self.settings():
            names = ",".join(f"{name}=…" for name in self.settings())
            raise UnsupportedError(
                f"{self.slug} has no setting `keep`, so a budget says nothing to it; give it as a plan with its own "
                f"settings: {self.slug}:{names}"
            )
        return self.replace(keep=Budget.parse(budget))

    def bind(self, info: ModelInfo) -> tuple["Method", tuple[Step, ...]]:
        """The resolved method and its steps, after checking that this model has the points and signals they ask for."""
        try:
            resolved = self.resolve(info)
            steps = tuple(step.resolved(info, self.signals()) for step in resolved.steps(info))
        except UnsupportedError as error:
            raise UnsupportedError(f"{self.slug} cannot run on {info.model}: {error}") from None
        for step in steps:
            if step.at.kind not in info.points:
                instead = f" Instead: {step.at.instead}." if step.at.instead else ""
                raise UnsupportedError(
                    f"{self.slug} acts at {step.at}, which {info.model} does not offer; "
                    f"it offers {', '.join(info.points)}.{instead}"
                )
            if step.at.name == "layers":
                info.lm_layer(step.at.index)  # type: ignore[arg-type]
        return resolved, steps

    def checked_steps(self, info: ModelInfo) -> tuple[Step, ...]:
        """The steps of `bind`."""
        return self.bind(info)[1]

    @classmethod
    def settings(cls) -> dict[str, dataclasses.Field]:
        """The settings that a plan may name: the dataclass fields, less those marked `metadata={"setting": False}`."""
        return {f.name: f for f in dataclasses.fields(cls) if f.metadata.get("setting", True)}  # type: ignore[arg-type]

    @classmethod
    def defaults(cls) -> dict[str, Any]:
        """The default of each setting, as an instance holds it, where there is one that its type allows."""
        found = {}
        for name, hint in types_of(cls).items():
            try:
                found[name] = _rounded(checked(cls.slug, name, hint, cls.settings()[name].default), cls.rounding)
            except WinnowError:
                continue  # such a setting must be given
        return found

    @classmethod
    def configured(cls, **values: Any) -> "Method":
        """An instance from plain values, as a plan string or a request gives them."""
        known = cls.settings()
        for name in values:
            if name not in known:
                near = difflib.get_close_matches(name, known, 1)
                hint = f" Did you mean {near[0]!r}?" if near else ""
                raise WinnowError(f"{cls.slug} has no setting {name!r}; it has {', '.join(known) or 'none'}.{hint}")
        return cls(**values)

    @classmethod
    def as_released(cls, **values: Any) -> "Method":
        """The method with the settings of the authors' released code, and those given on top."""
        if cls.released is None:
            raise WinnowError(f"{cls.slug} declares no released settings: no code of its authors is known.")
        return cls.configured(**({k: v for k, v in cls.released.items() if k != "positions"} | values))


def _rounded(value: Any, rounding: Rounding) -> Any:
    if isinstance(value, Budget):
        return value.rounded(rounding)
    if isinstance(value, tuple):
        return tuple(_rounded(v, rounding) for v in value)
    return value
