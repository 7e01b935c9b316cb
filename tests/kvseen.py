"""What steps of the cache are shown: a method that takes it down and changes nothing."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor

from winnow.contract import Action, CacheMethod, KVBudget, KVStep, KVView, ModelInfo, Observe, Point, State, register

_views: list[KVView] = []


@register("a-witness-of-places", stages=("cache",))
class Witness(CacheMethod):
    """Asks for all that can be shown."""

    keep: KVBudget = KVBudget("50%")

    def steps(self, info: ModelInfo) -> tuple[KVStep, ...]:
        when: Any = ("prefill", "decode")
        return tuple(KVStep(Point("kv", k), self.evict, when=when, calls=True, places=True) for k in range(info.depth))

    def evict(self, view: KVView, state: State) -> tuple[Action, State]:
        _views.append(view)
        return Observe(), state


@contextmanager
def witnessed() -> Iterator[list[KVView]]:
    """The views that the witness is shown from here on."""
    _views.clear()
    try:
        yield _views
    finally:
        _views.clear()


def projected(view: KVView, name: str) -> Tensor:
    """Queries or keys as the module projects them, before they are turned: `q_proj` or `k_proj`."""
    module, called = view.call  # type: ignore[misc]
    return getattr(module, name)(called["hidden_states"]).unflatten(2, (-1, view.keys.shape[3])).transpose(1, 2)
