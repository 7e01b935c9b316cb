"""What the layers of one compressed cache share."""

import copy
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

from torch import Tensor, nn

from winnow.cache.few import Few
from winnow.core.errors import UnsupportedError, WinnowError
from winnow.core.ledger import add_notes
from winnow.core.packing import Packing
from winnow.signals.tap import UNREAD


@dataclass(eq=False)
class Context:
    """Of one cache.

    Attributes:
        attachment: of the plan; a cache must not go on without it.
        methods: slugs, by their number in the plan.
        depth: layers of the language model.
        seed: of the plan.
        modules: what the methods built, by their number.
        rotary: turns keys; None where positions are not understood.
        kinds: gives `[B, n]` what each token is that is read now; None where nobody asks.
        places: gives, for a layer that runs now, `[B, n]` or `[B, n, 3]` the positions of the tokens that it reads;
            None where nobody asks.
        reads: gives, for a layer that runs now, where the tokens that it reads stood when the model was called, and
            `[B, L]` which of the slots that it held before are real (None: all); None where all layers read all.
        notes: what methods recorded.
        layers: of the cache.
        few: what later layers read of the token that is decoded now.
        room: decoded tokens for which storages are allocated once; None: they grow.
    """

    attachment: Any
    methods: tuple[str, ...]
    depth: int
    seed: int = 0
    modules: Any = field(default_factory=dict)
    rotary: Any = None
    kinds: Callable[[], Tensor] | None = None
    places: Callable[[int], Tensor] | None = None
    reads: Callable[[int], tuple[Packing, Tensor | None]] | None = None
    notes: dict[str, Any] = field(default_factory=dict)
    layers: list[Any] = field(default_factory=list)
    few: Few | None = None
    room: int | None = None
    _memo: tuple[Any, dict[Any, Any]] = field(default_factory=lambda: (None, {}))

    def __deepcopy__(self, memo: dict[int, Any]) -> "Context":
        """Of a copied cache: its own layers, and the same model, which a copy must not copy."""
        made = replace(
            self, kinds=None, places=None, reads=None, notes=dict(self.notes), layers=[], few=None, _memo=(None, {})
        )
        memo[id(self)] = made
        made.layers = copy.deepcopy(self.layers, memo)
        return made

    def check(self) -> None:
        """Refuse to go on when the plan is no longer attached."""
        if not self.attachment.attached:
            raise WinnowError(
                "this cache is compressed, but the model is no longer; compress it again with the same plan before you "
                "continue, or start with a new cache."
            )

    @property
    def all_changed(self) -> bool:
        """Whether every layer that a plan can shorten has been: none then asks what older tokens may be read."""
        return all(getattr(layer, "changed", True) for layer in self.layers)

    def once(self, key: Any, mask: Any, make: Callable[[], Any]) -> Any:
        """One computation for all layers that are given the same mask."""
        known, memo = self._memo
        if known is not mask:
            memo = {}
            self._memo = (mask, memo)
        if key not in memo:
            memo[key] = make()
        return memo[key]

    def few_of(self, layer: int) -> Few | None:
        """What a layer reads of its slots for the token that is decoded now; None: all."""
        if self.few is not None and layer <= self.few.layer:
            self.few = None  # said of an earlier token
        return self.few

    def note(self, notes: dict[str, Any]) -> None:
        """Take what a step recorded: counts add up."""
        add_notes(self.notes, notes)

    def forget(self) -> None:
        """Let go what belongs to the last forward."""
        self._memo = (None, {})
        self.reads = self.few = None

    def check_plain(self, module: nn.Module, kwargs: dict[str, Any]) -> None:
        """Refuse attention with caps or sinks where it is computed here."""
        special = [name for name in UNREAD if kwargs.get(name) is not None]
        if special:
            raise UnsupportedError(
                f"{type(module).__name__} attends with {', '.join(special)}, which heads that hold unequal numbers of "
                "slots do not; use a method that keeps as many in every head."
            )
