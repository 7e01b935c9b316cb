"""Steps and actions: what a method does at a point."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace
from typing import Any

from torch import Tensor

from winnow.core.errors import WinnowError
from winnow.core.info import ModelInfo
from winnow.core.layout import Layout
from winnow.core.point import Point
from winnow.core.reduction import Reduction
from winnow.core.signal import Signal


@dataclass(frozen=True)
class State:
    """What a method remembers between its steps, for a group of b items of one request.

    Attributes:
        token: `[b, N, …]` per token; the engine carries these through every reduction (a merged token gets what its
            representative had), whoever made it.
        item: `[b, …]` per item.
        request: anything else that belongs to the request (a streaming history); shared by its items. A method that
            uses it declares `streaming`.
        summed: `[b, N, …]` per token, like `token`, but an output gets the sum over the sources that feed it: how many
            patches a token stands for.

    A step returns its fields in the coordinates of the view that it saw; the engine carries them through its action.
    """

    token: dict[str, Tensor] = field(default_factory=dict)
    item: dict[str, Tensor] = field(default_factory=dict)
    request: dict[str, Any] = field(default_factory=dict)
    summed: dict[str, Tensor] = field(default_factory=dict)


class Action:
    """What a step asks the engine to do."""


@dataclass(frozen=True)
class Reduce(Action):
    """N → M rows. `separators="drop"` also removes the item's newlines; they go as well when nothing is kept.

    `log_bias`, `[b, M]`, is added to the attention logits of each output as a key, in every later module of the same
    stack (tower or LM); outputs of later reductions have that of their representative. It replaces the method's
    earlier one.
    """

    reduction: Reduction
    separators: str = "keep"
    log_bias: Tensor | None = None


@dataclass(frozen=True)
class Observe(Action):
    """Nothing changes here; the step only looked (and perhaps remembered)."""


@dataclass(frozen=True)
class Route(Action):
    """Only these rows are computed by the module at this point; all rows survive.

    `output`, `[b, N, D]`, when given, supplies the rows that are not computed (a cache); else they pass through
    unchanged. `context`, when given, holds keys and values `[b, N, H·d]` of all rows: the computed rows attend to it,
    with their own keys and values in their places; else they attend to each other alone.
    """

    rows: Reduction
    output: Tensor | None = None
    context: tuple[Tensor, Tensor] | None = None


@dataclass(frozen=True)
class Attend(Action):
    """Only these key/value rows are read in this step.

    Before a layer attends in a prefill: by that layer. For a decoded token: by all later layers, of which each holds
    what this one does; nothing is dropped, so that other rows can be read for the next token.
    """

    rows: Reduction


@dataclass(frozen=True)
class KVReduce(Action):
    """Separate maps per head for keys and values, with an optional additive bias on the logits of each new key.

    Args:
        k, v: maps with lanes `[b, H]`.
        log_bias: `[b, H, M]`.
    """

    k: Reduction
    v: Reduction
    log_bias: Tensor | None = None


@dataclass(frozen=True)
class Parted(Action):
    """Before a layer attends in a prefill: its rows attend in parts, each part to some slots alone.

    Of the slots of its part, a row reads those that it would read without parts. Each row is in one part, or among the
    last rows, which read what is left of the cache in the place of the slots before them.

    Args:
        parts: of each sample, rows and the slots that they read, `[r]` and `[s]`; both are slots of the view.
        left: what is left of keys and values; the last outputs are the last rows themselves.
        last: of each sample, how many rows read that.
    """

    parts: tuple[tuple[tuple[Tensor, Tensor], ...], ...]
    left: KVReduce | None = None
    last: tuple[int, ...] = ()


@dataclass(frozen=True)
class Follow(Action):
    """Of what was read in this forward, the caches of these layers keep the tokens that this layer has read."""

    layers: tuple[int, ...]


@dataclass(frozen=True)
class Emit(Action):
    """New tokens that are not linear in the old.

    Args:
        tokens: `[b, M, D]`.
        provenance: from which of the old tokens each one is (attention of queries over the tokens, say), and whose
            place and position it takes. Records, overlays, states and signals go by it.
        layout: of tokens that take no places of old ones; then there need be no provenance.
        separators: as for `Reduce`.
    """

    tokens: Tensor
    provenance: Reduction | None = None
    layout: Layout | None = None
    separators: str = "keep"


@dataclass(frozen=True)
class Repose(Action):
    """New positions for the tokens: `[b, N]`.

    Args:
        positions: at `kv`, by how much keys are turned, `[b, N]` or `[b, G, N]`.
        keys: `[b, G, N, d]` that are turned at `kv`, in the place of those that are stored. A method that moves keys
            again and again remembers them as they were first, so that rounding does not add up.
    """

    positions: Tensor
    keys: Tensor | None = None


@dataclass(frozen=True)
class Recut(Action):
    """At `pixels`: the part of a picture that enters, and the size to which it is scaled.

    Args:
        box: left, top, right and bottom in pixels of the picture, the last two not included; None: all of it.
        size: height and width in pixels, within the limits of `winnow.media`; None: as large as the part is.
    """

    box: tuple[int, int, int, int] | None = None
    size: tuple[int, int] | None = None


Answer = Action | Reduction | tuple[Action | Reduction, State]


@dataclass(frozen=True)
class Step:
    """One act of a method: at a point, with the signals it needs, a pure function of view and state.

    `run` returns an Action, or a bare Reduction, which stands for `Reduce(reduction)`; with a State beside it where the
    method remembers something. It reads its signals as it listed them, although they were resolved for a model since.
    """

    at: Point
    run: Callable[[Any, State], Answer]
    needs: tuple[Signal, ...] = ()
    names: tuple[tuple[Signal, Signal], ...] = ()

    def resolved(self, info: ModelInfo, also: Iterable[Signal] = ()) -> "Step":
        """The step with its signals made definite for a model; it still reads them by the names that it listed.

        Args:
            also: other names by which it may read them.
        """
        names = [(name, name.resolve(info)) for name in self.needs]
        needs = tuple(signal for _, signal in names)
        names += [(name, signal.resolve(info)) for name, signal in self.names]
        for name in also:
            try:
                signal = name.resolve(info)
            except WinnowError:  # a name that a method does not use on this model
                continue
            names += [(name, signal)] if signal in needs else []
        return replace(self, needs=needs, names=tuple(names))

    def signals(self, value: Callable[[Signal], Tensor]) -> dict[Signal, Tensor]:
        """What a view must hold for this step: the values, under all names that the step reads them by."""
        found = {signal: value(signal) for signal in self.needs}
        return found | {name: found[signal] for name, signal in self.names}

    def act(self, view: Any, state: State) -> tuple[Action, State]:
        """Run the step: its action, and what the method remembers from now on."""
        answer = self.run(view, state)
        if isinstance(answer, tuple):
            answer, state = answer
        return (Reduce(answer) if isinstance(answer, Reduction) else answer), state
