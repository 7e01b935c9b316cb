"""Few: a layer says which slots later layers read for the token that is decoded now. Nothing is dropped."""

from dataclasses import dataclass
from typing import Any

from winnow.cache.groups import Group
from winnow.core.errors import UnsupportedError, WinnowError
from winnow.core.reduction import Reduction
from winnow.core.step import Attend, Parted

Rows = list[tuple[Group, Reduction | Parted | None]]
"""For each group of samples, the map of the slots that are read, or the parts of a prefill; None: all are read."""


@dataclass(frozen=True, eq=False)
class Few:
    """What was said.

    Attributes:
        layer: that said so.
        method: slug of the method that did.
        held: slots of that layer.
        rows: that later layers read.
    """

    layer: int
    method: str
    held: int
    rows: Rows

    @staticmethod
    def of(layer: Any, method: str, answers: Any) -> "Few":
        """From the answers of a step behind a layer: `Attend`, or anything else where all is read."""
        if layer.changed:
            raise UnsupportedError(
                f"{method} chooses among all slots that were read, and layer {layer.index} no longer holds them; name "
                "no other method of the cache beside it."
            )
        rows: Rows = []
        for group, view, action in answers:
            chosen = action.rows if isinstance(action, Attend) else None
            if chosen is not None:
                last = chosen.representatives.masked_fill(~chosen.valid, 0).amax(1)
                if chosen.n != view.n or not bool((last == view.n - 1).all()):
                    raise WinnowError(
                        f"{method}: what is read for a decoded token is some of {view.n} slots, the last one, which is "
                        f"its own, included; got a map of {chosen.n}."
                    )
            rows.append((group, chosen))
        return Few(layer.index, method, layer.store.length, rows)

    def of_layer(self, layer: Any) -> Rows:
        """What a later layer reads of its own slots.

        Raises:
            UnsupportedError: it holds other slots than the layer that chose.
        """
        if layer.changed or layer.store.length != self.held:
            raise UnsupportedError(
                f"{self.method} chooses at layer {self.layer} what later layers read, and layer {layer.index} holds "
                "other slots; use it without methods that shorten caches, or drop tokens behind that layer."
            )
        return self.rows
