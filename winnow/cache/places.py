"""Places: at which positions the tokens stand of which a layer still holds a slot."""

from collections.abc import Callable

import torch
from jaxtyping import Int
from torch import Tensor

from winnow.cache.groups import slots_of
from winnow.cache.ragged import Ragged

# Decoded tokens between two searches for what has left: each waits for the device.
_WAIT = 64


class Places:
    """Of the tokens that a layer has read.

    Attributes:
        at: `[B, n]` or `[B, n, 3]` the positions of the tokens that are known.
        numbers: `[n]` int64, ascending: how many tokens were read before each of them. The newest are always known.
    """

    def __init__(self, at: Int[Tensor, "b n *axes"]) -> None:
        self.at = at
        self.numbers = torch.arange(at.shape[1], device=at.device)
        self._settled = 0

    @staticmethod
    def of_a_plain_cache(seen: int, like: Int[Tensor, "b m *axes"]) -> "Places":
        """Of tokens that a plain cache held, which were read without gaps; samples and axes as those of `like`."""
        at = torch.arange(seen, device=like.device).reshape(1, -1, *(1,) * (like.ndim - 2))
        return Places(at.expand(like.shape[0], -1, *like.shape[2:]))

    def append(self, now: Int[Tensor, "b m *axes"], seen: int) -> None:
        """The tokens that are read now, behind `seen` others."""
        later = torch.arange(seen, seen + now.shape[1], device=self.numbers.device)
        self.at, self.numbers = torch.cat([self.at, now], 1), torch.cat([self.numbers, later])

    def of(self, rows: tuple[int, ...], numbers: Int[Tensor, "b g m"]) -> Int[Tensor, "b g m *axes"]:
        """Where tokens of some samples stand: those of slots that are held, or the newest."""
        own = self.at.to(numbers.device)[torch.tensor(rows, device=numbers.device)]
        where = torch.searchsorted(self.numbers.to(numbers.device), numbers.long().contiguous())
        lanes = torch.arange(len(rows), device=numbers.device)[:, None, None]
        return own[lanes, where]

    def newest(self, rows: tuple[int, ...], q: int) -> Int[Tensor, "b q *axes"]:
        """Where the q tokens stand that were read last."""
        return self.at[torch.tensor(rows, device=self.at.device), self.at.shape[1] - q :]

    def keep(self, store: object, seen: int, newest: int, decoding: bool) -> None:
        """Forget the tokens of which no head of any sample holds a slot, but for the newest.

        Args:
            decoding: whether that may wait for more tokens.
        """
        if decoding and len(self.numbers) < self._settled + _WAIT:
            return
        slots = store.slots_held() if isinstance(store, Ragged) else slots_of(store, seen)
        later = torch.arange(seen - newest, seen, device=self.numbers.device)
        wanted = torch.cat([slots.flatten().to(later), later]).unique()
        stays = torch.isin(self.numbers, wanted, assume_unique=True)
        self.at, self.numbers = self.at[:, stays], self.numbers[stays]
        self._settled = len(self.numbers)

    def crop(self, seen: int) -> None:
        """Only `seen` tokens were read."""
        left = int((self.numbers < seen).sum())
        self.at, self.numbers = self.at[:, :left], self.numbers[:left]

    def move(self, move: Callable[[Tensor], Tensor]) -> None:
        """Samples were chosen, repeated or reordered."""
        self.at = move(self.at)
