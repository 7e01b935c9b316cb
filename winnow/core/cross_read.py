"""CrossRead: rows of the language model read what a method keeps beside the sequence, inside some of its layers."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from jaxtyping import Float, Int
from torch import Tensor

from winnow.core.layout import Layout

Kind = Literal["text", "visual"]
Place = Literal["heads", "residual"]


@dataclass(frozen=True)
class Rows:
    """What a cross-read sees: rows of one kind and of one sample, inside one layer of the language model.

    Attributes:
        carried: `[n, W]` what the answer is added to: see `CrossRead.place`.
        memory: of each item that these rows may read, in order, what the method remembers of it: `State.item`, without
            its first axis. At least one.
        queries: `[H, n, d]` with which these rows attend in this layer, turned to their positions; at `heads` only.
        ids: `[n]` which content token of its item each row is (a merged one: its representative); visual rows only.
        layout: of that item; visual rows only.
        module: what the method's `build` made.
    """

    carried: Float[Tensor, "n w"]
    memory: tuple[Mapping[str, Tensor], ...]
    queries: Float[Tensor, "h n d"] | None = None
    ids: Int[Tensor, " n"] | None = None
    layout: Layout | None = None
    module: Any = None


@dataclass(frozen=True)
class CrossRead:
    """Rows of one kind read, in one layer, what the method remembers of the items of their sample.

    It holds for the prompt, for later turns and for each decoded token, as long as the cache of the request lives.

    Attributes:
        layer: of the language model.
        kind: which rows read. `text`: all that are neither padding nor of an item; they read all items of their sample
            that the method remembers, whatever stands before or behind them. `visual`: what is left of an item in the
            sequence; it reads its own item.
        place: what the answer is added to. `heads`: what the heads give, side by side, before the output projection of
            the attention. `residual`: the states behind the attention, before the norm of the MLP.
        run: gives what is added to the rows, `[n, W]`.
    """

    layer: int
    kind: Kind
    place: Place
    run: Callable[[Rows], Tensor]
