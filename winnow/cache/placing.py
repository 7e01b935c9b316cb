"""Where the slots of a layer lie: in storages that are allocated once, and on the CPU between two attentions."""

from typing import Any

import torch
from torch import Tensor

from winnow.cache.blocks import Coded
from winnow.cache.context import Context
from winnow.cache.dense import Dense
from winnow.cache.ragged import Ragged
from winnow.core.errors import UnsupportedError

Store = Dense | Coded | Ragged


class Placing:
    """Of a `HeldLayer`.

    Attributes:
        waits: whether the attention of this forward is still to come.
        leaves: whether the layer goes to the CPU when it has attended.
        away: whether it is there.
    """

    store: Store | None
    context: Context
    runner: Any
    device: torch.device
    waits = leaves = away = False

    def tensors(self) -> list[Tensor]:
        """All that this layer holds."""
        return [] if self.store is None else [*self.store.tensors(), *self.runner.tensors()]

    def bound(self, store: Store, decoding: bool = False) -> None:
        """Allocate a new store with all the room that decoded tokens will take, where a cache asks for it.

        Args:
            decoding: whether it takes the place of one that was made so.
        """
        room = self.context.room
        if room is None:
            return
        if not isinstance(store, Dense):
            raise UnsupportedError(
                "a bounded cache holds as many slots in every head, stored as they are; use "
                f"{self.runner.slugs} with the default cache."
            )
        capacity, most = store.length + room, self.runner.most
        if most is not None:
            capacity = min(capacity, max(most, store.length + 1))
        old = self.store if decoding and isinstance(self.store, Dense) else None
        store.reserve(capacity if old is None else old.capacity, old)

    def offload(self) -> None:
        """Move all that is held to the CPU, behind the attention of this forward, for which it is asked too early."""
        self.leaves = self.waits
        if not self.waits and self.store is not None:
            self._bring_to(torch.device("cpu"))
            self.away = True

    def prefetch(self) -> None:
        """Move what is held back to where the layer runs."""
        if not self.away:
            return
        self._bring_to(self.device)
        self.away = False
        if self.device.type == "cuda":  # moved on a stream of its own, and read on another
            for x in self.tensors():
                x.record_stream(torch.cuda.default_stream(self.device))

    def _bring_to(self, device: torch.device) -> None:
        def move(x: Tensor) -> Tensor:
            return x.to(device)

        self.store.each(move)  # type: ignore[union-attr]
        self.runner.each(move)
