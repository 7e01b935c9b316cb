"""Dense: keys and values of one layer in rectangular tensors; every head of a sample holds as many slots."""

from collections.abc import Callable, Iterator
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from winnow.core.errors import WinnowError

_ROOM = 64


class Dense:
    """Slots of b samples, padding in front.

    Attributes:
        real: `[B, L]` False for padding; None if nothing pads.
        bias: `[B, G, L]` added to the logits of each slot as a key; None if nothing is.
        slots: `[B, G, P]` int32: how many tokens were read before each of the first P slots; the later ones were read
            last, one after the other. None: so were all.
        grows: whether room for later tokens is kept behind the last one, so that they are written in place. Off, what
            is held is a new tensor at each token, as in transformers' own cache.
        bounded: whether the room is all that there will be for decoded tokens.
    """

    bounded = False

    def __init__(
        self,
        keys: Float[Tensor, "b g n d"],
        values: Float[Tensor, "b g n e"],
        real: Bool[Tensor, "b n"] | None = None,
        bias: Float[Tensor, "b g n"] | None = None,
        slots: Int[Tensor, "b g p"] | None = None,
        grows: bool = False,
    ) -> None:
        self._keys, self._values, self.length = keys, values, keys.shape[2]
        self.real, self.bias, self.slots, self.grows = real, bias, slots, grows

    @property
    def rows_held(self) -> int:
        """Samples."""
        return self._keys.shape[0]

    @property
    def heads(self) -> int:
        """KV heads."""
        return self._keys.shape[1]

    @property
    def capacity(self) -> int:
        """Slots for which there is room."""
        return self._keys.shape[2]

    @property
    def keys(self) -> Tensor:
        return self._keys[:, :, : self.length]

    @property
    def values(self) -> Tensor:
        return self._values[:, :, : self.length]

    def read(self) -> tuple[Tensor, Tensor]:
        """Keys and values `[B, G, L, d]`."""
        if self._keys.shape[2] == self.length:
            return self._keys, self._values
        return self.keys, self.values

    def append(self, keys: Tensor, values: Tensor, real: Tensor | None = None, seen: int = 0) -> None:
        """Add slots behind the others.

        Args:
            real: `[B, n]` which of them are; None: all.
            seen: tokens that were read before; only a ragged store writes them down.
        """
        n = keys.shape[2]
        if self.real is not None or real is not None:
            old = _ones(self.real, keys.shape[0], self.length, keys.device)
            self.real = torch.cat([old, _ones(real, keys.shape[0], n, keys.device)], 1)
        if self.bias is not None:
            self.bias = torch.nn.functional.pad(self.bias, (0, n))
        if not self.grows or keys.requires_grad or self._keys.requires_grad:
            self._keys = torch.cat([self.keys, keys], 2)
            self._values = torch.cat([self.values, values], 2)
        else:
            if self.length + n > self.capacity:
                if self.bounded and n == 1:
                    raise WinnowError(
                        f"this cache has room for {self.capacity} slots of a head, and all are taken; make it "
                        "with a larger max_new_tokens."
                    )
                self._keys, self._values = (_with_room(x, self.length, n + _ROOM) for x in (self._keys, self._values))
            self._keys[:, :, self.length : self.length + n] = keys
            self._values[:, :, self.length : self.length + n] = values
        self.length += n

    def reserve(self, capacity: int, place: "Dense | None" = None) -> None:
        """Room for `capacity` slots, which no decoded token goes beyond.

        Args:
            place: whose storages to take, where they have exactly this room.
        """
        capacity = max(capacity, self.length)
        if place is not None and place._keys.shape[:3] == (*self._keys.shape[:2], capacity):
            place._keys[:, :, : self.length], place._values[:, :, : self.length] = self.keys, self.values
            self._keys, self._values = place._keys, place._values
        else:
            self._keys, self._values = (_with_room(x, self.length, capacity - self.length) for x in self.read())
        self.grows = self.bounded = True

    def crop(self, count: int) -> None:
        """Without the last slots."""
        self.length -= count
        self.real = None if self.real is None else self.real[:, : self.length]
        self.bias = None if self.bias is None else self.bias[:, :, : self.length]

    def rows(self, move: Any) -> "Dense":
        """Moved samples: `move` takes a tensor and gives it with its rows chosen, repeated or reordered."""
        real, bias, slots = (None if x is None else move(x) for x in (self.real, self.bias, self.slots))
        keys, values = self.read()
        made = Dense(move(keys), move(values), real, bias, slots, self.grows)
        if self.bounded:
            made.reserve(self.capacity)
        return made

    def each(self, change: Callable[[Tensor], Tensor]) -> None:
        """Put `change` of each tensor that is held in its place; the room behind the last slot stays."""
        self._keys, self._values = change(self._keys), change(self._values)
        self.real, self.bias, self.slots = (
            None if x is None else change(x) for x in (self.real, self.bias, self.slots)
        )

    def tensors(self) -> Iterator[Tensor]:
        """All that is held."""
        yield from (x for x in (self._keys, self._values, self.real, self.bias, self.slots) if x is not None)


def _ones(real: Tensor | None, rows: int, n: int, device: torch.device) -> Tensor:
    return torch.ones(rows, n, dtype=torch.bool, device=device) if real is None else real.to(device)


def _with_room(x: Tensor, length: int, room: int) -> Tensor:
    made = x.new_empty(*x.shape[:2], length + room, x.shape[3])
    made[:, :, :length] = x[:, :, :length]
    return made
