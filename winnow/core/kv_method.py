"""CacheMethod: a method that shortens the KV cache by a score."""

from typing import Any, ClassVar

from jaxtyping import Float
from torch import Tensor

from winnow.core.budget import Rounding
from winnow.core.info import ModelInfo
from winnow.core.kv import KVStep, KVView, Moment
from winnow.core.kv_budget import KVBudget
from winnow.core.kv_select import best_slots
from winnow.core.method import Method
from winnow.core.point import Point
from winnow.core.step import Action, KVReduce, Observe, State


class CacheMethod(Method):
    """A frozen dataclass of settings, like every method; it acts at `kv[k]` of every layer.

    A method that ranks slots defines `score(view)`; one that does something else with them defines `shorten(view)`, or
    `evict(view, state)` if it remembers something. Its setting `keep` is a `KVBudget` of the prompt. Where it has a
    setting `limit`, a head holds at most `limit` slots and `every` more while tokens are decoded: then it is shortened
    to `limit` again.

    Class attributes:
        recent: queries of earlier forwards that it wants while decoding.
        decodes: whether it runs for decoded tokens though it has no limit.
        places: whether it wants to know where slots stand; see `KVView.positions`.
        one_scale: whether scores of different heads can be compared, as shares of attention can.
    """

    at: ClassVar[str] = "kv"
    rounding: ClassVar[Rounding] = "floor"
    recent: ClassVar[int] = 0
    decodes: ClassVar[bool] = False
    places: ClassVar[bool] = False
    one_scale: ClassVar[bool] = False

    def score(self, view: Any) -> Float[Tensor, "b g n"]:
        """`[b, G, N]` how much each slot matters to each head."""
        raise NotImplementedError(f"{type(self).__name__} defines none of score(view), shorten(view, keep), evict")

    def ends(self, view: KVView) -> tuple[int, int]:
        """The first and the last slots that always stay: sinks, and a window."""
        return 0, 0

    def shorten(self, view: KVView, keep: KVBudget) -> KVReduce | None:
        """What is left under a budget; None where all stays. By default the slots with the highest scores."""
        if keep.is_all or (not keep.is_kinds and not keep.is_mass and view.budget(keep) >= view.n):
            return None
        first, last = self.ends(view)
        return best_slots(self.score(view), keep, view, first=first, last=last)

    def budget_now(self, view: KVView) -> KVBudget | None:
        """The budget that holds at this moment; None where there is nothing to do yet."""
        limit = getattr(self, "limit", None)
        if view.moment == "prefill":
            keep: KVBudget = self.keep  # type: ignore[attr-defined]
            return keep
        if limit is None or view.n < self.most:  # type: ignore[operator]
            return None
        return KVBudget(limit)

    @property
    def most(self) -> int | None:
        """Slots that a head holds while decoding, before it is shortened to `limit` again; None without a limit."""
        limit = getattr(self, "limit", None)
        return None if limit is None else int(limit) + max(1, getattr(self, "every", 1))

    def evict(self, view: KVView, state: State) -> tuple[Action, State]:
        """The step: what it does to the cache now, and what it remembers from now on."""
        keep = self.budget_now(view)
        action = None if keep is None else self.shorten(view, keep)
        return (Observe() if action is None else action), state

    def steps(self, info: ModelInfo) -> tuple[KVStep, ...]:
        decodes = self.decodes or getattr(self, "limit", None) is not None
        when: tuple[Moment, ...] = ("prefill", "decode") if decodes else ("prefill",)
        recent = self.recent if decodes else 0
        given = {"when": when, "recent": recent, "places": self.places, "most": self.most}
        return tuple(KVStep(Point("kv", k), self.evict, **given) for k in range(info.depth))  # type: ignore[arg-type]

    @classmethod
    def takes_budgets(cls) -> bool:
        return "keep" in cls.settings()

    def at_budget(self, budget, content):
        """The same method at another budget of the cache."""
        if not self.takes_budgets():  # a codec, whose slots all stay
            return super().at_budget(budget, content)
        return self.replace(keep=KVBudget.parse(budget))
