"""View: what a step sees. Dense tensors of equal length; the engine groups items so that nothing is padded."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from winnow.core.errors import WinnowError
from winnow.core.layout import Layout
from winnow.core.signal import Signal


@dataclass(frozen=True)
class View:
    """The tokens of a group of b items of equal shape, and the signals that the step asked for.

    Attributes:
        tokens: `[b, N, D]` content tokens at this point ([CLS] included at `features`).
        layout: the item's layout at this point (the tower's at `features`, else as it entered the LM).
        ids: `[b, N]` absolute ids: which content token of `layout` each one is (a merged token: its representative).
        n_visual: content tokens of the item as the encoder gave it, the denominator of budgets.
        n_lm: content tokens with which it entered the LM, behind the connector's steps; `n_visual` before that.
        signals: what the step listed in `needs`; read it with `view[signal]`.
        seed: seeds this view's own random numbers; the global generator is never used.
        module: what the method's `build` made, on the right device and in the right dtype; None if it made nothing.
    """

    tokens: Float[Tensor, "b n d"]
    layout: Layout
    ids: Int[Tensor, "b n"]
    n_visual: int
    signals: Mapping[Signal, Tensor] = field(default_factory=dict)
    only: Tensor | None = None
    seed: int = 0
    notes: dict[str, Any] = field(default_factory=dict)
    module: Any = None
    n_lm: int = 0

    def __post_init__(self) -> None:
        if not self.n_lm:
            object.__setattr__(self, "n_lm", self.n_visual)

    @staticmethod
    def of(
        tokens: Tensor,
        signal: Tensor | Mapping[Signal, Tensor] | None = None,
        *,
        layout: Layout | None = None,
        n_visual: int | None = None,
        n_lm: int = 0,
        seed: int = 0,
    ) -> "View":
        """A view on plain tensors, without a model; a single tensor is returned for every signal."""
        if tokens.ndim != 3:
            raise WinnowError(f"View.of takes tokens of shape [b, N, D]; got {tuple(tokens.shape)}.")
        b, n, _ = tokens.shape
        layout = layout or Layout.grid(1, n)
        ids = torch.arange(n, device=tokens.device).expand(b, n)
        named = signal if isinstance(signal, Mapping) else {}
        only = signal if isinstance(signal, Tensor) else None
        n_visual = layout.n_content if n_visual is None else n_visual
        return View(tokens, layout, ids, n_visual, named, only, seed, n_lm=n_lm)

    def __getitem__(self, signal: Signal) -> Tensor:
        if signal in self.signals:
            return self.signals[signal]
        if self.only is not None:
            return self.only
        have = ", ".join(map(str, self.signals)) or "none"
        raise WinnowError(f"The view has no {signal}; a step reads only what it lists in `needs`. Present: {have}.")

    @property
    def b(self) -> int:
        return self.tokens.shape[0]

    @property
    def n(self) -> int:
        return self.tokens.shape[1]

    def rand(self, *shape: int) -> Float[Tensor, "..."]:
        """Uniform numbers in [0, 1), `[b, *shape]`: the same for every item, so that a batch equals its items."""
        generator = torch.Generator().manual_seed(self.seed)
        return torch.rand(*shape, generator=generator).to(self.tokens.device).expand(self.b, *shape)

    def groups(self, array: Any) -> Int[Tensor, "b n"]:
        """A per-content-token array of the layout (tiles, rows, …) at the ids of this view."""
        return torch.tensor(array, device=self.tokens.device)[self.ids]
