"""EncoderRecord: what one call of the encoder left for the language model, carried by the encoder's own output."""

import dataclasses
import functools
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from winnow.core.entered import Entered
from winnow.core.errors import WinnowError
from winnow.core.layout import Layout
from winnow.core.signal import Signal
from winnow.engine.bound_plan import BoundPlan
from winnow.engine.item_tokens import TowerTokens
from winnow.models.family import Encoding


@dataclass(eq=False)
class Reading:
    """A signal as it was read at each call of its site.

    Attributes:
        calls: what it gave at each call.
        prefix: rows of each call that stand before the patches.
        joined: `[cells, …]` all calls together, once somebody has asked for it.
    """

    calls: list[Tensor] = field(default_factory=list)
    prefix: int = 0
    joined: Tensor | None = None


@dataclass(eq=False)
class EncoderRecord(Encoding):
    """One call of the encoder under a plan.

    Attributes:
        plan: under which it was made.
        undivided: whether the encoder gave one tensor for all items, which only the prompt can tell apart.
        layouts: of the items in the LM's sequence.
        readings: what the plan's signals read.
        tower: the pass through the blocks, while it lasts, where the plan has steps there.
        reduced: the items as steps at `features` left them, in content coordinates; None if they changed nothing.
        looked: the items that steps at `features` only looked at.
        projected_shape: that the projector's output would have had to have, but for its width.
        notes: what steps at `features` recorded.
        times: milliseconds by phase.
        entered: number of an item → how its picture entered; None until the caller of a forward has said it. A later
            turn reads it here.
    """

    plan: BoundPlan | None = None
    undivided: bool = False
    layouts: tuple[Layout, ...] = ()
    readings: dict[Signal, Reading] = field(default_factory=dict)
    tower: Any = None
    tower_output: Any = None
    items: list[TowerTokens] = field(default_factory=list)
    projected_shape: tuple[int, ...] = (0, 0)
    notes: dict[str, Any] = field(default_factory=dict)
    times: dict[str, float] = field(default_factory=dict)
    entered: dict[int, Entered] | None = None

    def __deepcopy__(self, memo: dict[int, Any]) -> "EncoderRecord":
        return self  # nothing changes it once the encoder is done, and a copied output is the same encoding

    @property
    def reduced(self) -> bool:
        """Whether steps of the tower, at blocks or at `features`, changed any item."""
        return any(item.reduced for item in self.items)

    def calls_of(self, signal: Signal) -> Reading:
        if signal not in self.readings:
            raise WinnowError(
                f"{signal} was not recorded: these encoder outputs were made without this plan. "
                "Encode under the plan (pass pixel_values), or make the outputs inside the same `using`."
            )
        return self.readings[signal]


@functools.cache
def _marked(plain: Any) -> Any:
    """A class of outputs with a field for the record, so that copies, moves and tree maps keep it."""
    made = type(f"Compressed{plain.__name__}", (plain,), {"__annotations__": {"winnow": Any}, "winnow": None})
    return dataclasses.dataclass(made)


def mark(output: Any, record: EncoderRecord) -> Any:
    """The encoder's output with its record."""
    fields = {f.name: getattr(output, f.name) for f in dataclasses.fields(output)}
    kind: Any = type(output)
    return _marked(kind)(**fields, winnow=record)


def unmarked(output: Any) -> Any:
    """The encoder's output as the plain class gives it."""
    if not is_marked(output):
        return output
    plain: Any = type(output).__bases__[0]
    return plain(**{f.name: getattr(output, f.name) for f in dataclasses.fields(plain)})


def record_of(output: Any) -> EncoderRecord | None:
    """The record that an encoder's output carries."""
    return getattr(output, "winnow", None)


def is_marked(output: Any) -> bool:
    """Whether an output comes from the encoder of a compressed model, with or without its record."""
    return hasattr(type(output), "winnow")
