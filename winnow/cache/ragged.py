"""Ragged: each head of each sample holds its own number of slots, and no memory is spent on the others.

All heads lie behind one another in one tensor, each with a little room for later tokens, which are written in place.
"""

from collections.abc import Callable, Iterator
from itertools import accumulate
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from winnow.cache import varlen

_ROOM = 16


class Ragged:
    """Slots of b samples and G heads.

    Attributes:
        lengths: slots of each lane (sample-major) on the host.
        slots: `[T]` int32: how many tokens were read before each slot of the tensors that follow, laid out alike.
        bias: `[T]` added to the logits of each slot as a key; None if nothing is.
    """

    real = None
    grows = True

    def __init__(
        self,
        keys: Float[Tensor, "t d"],
        values: Float[Tensor, "t e"],
        lengths: tuple[int, ...],
        rooms: tuple[int, ...],
        heads: int,
        bias: Float[Tensor, " t"] | None = None,
        slots: Tensor | None = None,
    ) -> None:
        self.flat_keys, self.flat_values, self.heads = keys, values, heads
        self.lengths, self._rooms, self.bias, self.slots = list(lengths), list(rooms), bias, slots
        self._starts = list(accumulate(rooms, initial=0))[:-1]
        self._ends = torch.tensor([s + n for s, n in zip(self._starts, self.lengths, strict=True)], device=keys.device)
        self._bounds: Tensor | None = None  # as the kernel of a GPU reads them

    @staticmethod
    def of(lanes: list[tuple[Tensor, ...]], heads: int, with_bias: bool) -> "Ragged":
        """From (keys `[n, d]`, values `[n, e]`, slots `[n]`, bias `[n]` or None) of each lane."""
        lengths = tuple(lane[0].shape[0] for lane in lanes)
        rooms = tuple(n + _ROOM for n in lengths)
        keys, values, slots, bias = (
            _laid_out([lane[i] for lane in lanes], rooms) if i < 3 or with_bias else None for i in range(4)
        )
        return Ragged(keys, values, lengths, rooms, heads, bias, slots)  # type: ignore[arg-type]

    @property
    def rows_held(self) -> int:
        """Samples."""
        return len(self.lengths) // self.heads

    @property
    def length(self) -> int:
        """Slots of the fullest head."""
        return max(self.lengths)

    def lane(self, i: int) -> tuple[Tensor, ...]:
        """Keys, values, slots and bias of a lane."""
        part = slice(self._starts[i], self._starts[i] + self.lengths[i])
        bias = None if self.bias is None else self.bias[part]
        return self.flat_keys[part], self.flat_values[part], self.slots[part], bias  # type: ignore[index,return-value]

    def slots_held(self) -> Int[Tensor, " m"]:
        """How many tokens were read before each slot of all lanes."""
        return torch.cat([self.lane(i)[2] for i in range(len(self.lengths))])

    def append(self, keys: Tensor, values: Tensor, real: Tensor | None = None, seen: int = 0) -> None:
        """Add slots behind those of each lane.

        Args:
            real: `[B, n]` which of them are; the others are left out.
            seen: tokens that were read before.
        """
        n = keys.shape[2]
        if real is not None or n > 1 or any(a >= b for a, b in zip(self.lengths, self._rooms, strict=True)):
            self._rebuild(keys, values, real, seen)
            return
        self.flat_keys[self._ends] = keys.flatten(0, 2)
        self.flat_values[self._ends] = values.flatten(0, 2)
        if self.slots is not None:
            self.slots[self._ends] = seen
        if self.bias is not None:
            self.bias[self._ends] = 0
        self._ends += 1
        self.lengths = [length + 1 for length in self.lengths]

    def _rebuild(self, keys: Tensor, values: Tensor, real: Tensor | None, seen: int) -> None:
        lanes = []
        order = torch.arange(seen, seen + keys.shape[2], dtype=torch.int32, device=keys.device)
        for i in range(len(self.lengths)):
            row, head = divmod(i, self.heads)
            new = (keys[row, head], values[row, head], order, keys.new_zeros(keys.shape[2]))
            if real is not None:
                new = tuple(x[real[row]] for x in new)  # type: ignore[assignment]
            old = self.lane(i)
            lanes.append(
                tuple(None if a is None else torch.cat([a, b.to(a.dtype)]) for a, b in zip(old, new, strict=True))
            )
        made = Ragged.of(lanes, self.heads, self.bias is not None)
        self.__dict__.update(made.__dict__)

    def crop(self, count: int) -> None:
        self.lengths = [length - count for length in self.lengths]
        self._ends = self._ends - count

    def rows(self, move: Any) -> "Ragged":
        """Moved samples; see `Dense.rows`."""
        samples = len(self.lengths) // self.heads
        order = move(torch.arange(samples)[:, None])[:, 0].tolist()
        lanes = [self.lane(row * self.heads + head) for row in order for head in range(self.heads)]
        return Ragged.of(lanes, self.heads, self.bias is not None)

    def each(self, change: Callable[[Tensor], Tensor]) -> None:
        """As `Dense.each`."""
        self.flat_keys, self.flat_values, self._ends = (
            change(x) for x in (self.flat_keys, self.flat_values, self._ends)
        )
        rest = (self.slots, self.bias, self._bounds)
        self.slots, self.bias, self._bounds = (None if x is None else change(x) for x in rest)

    def tensors(self) -> Iterator[Tensor]:
        held = (self.flat_keys, self.flat_values, self.slots, self.bias, self._ends, self._bounds)
        yield from (x for x in held if x is not None)

    def attend(self, query: Float[Tensor, "b h q d"], latest: Tensor | None, scaling: float) -> Tensor:
        """Attention outputs `[B, q, H, e]`: every lane by itself, over exactly the slots that it holds.

        Args:
            latest: `[B, q, q]` what each query reads of the newest q tokens; None: itself and those before.
        """
        b, h, q, d = query.shape
        group = h // self.heads
        if query.is_cuda:
            if q == 1 and self.bias is None and varlen.able(query, self.flat_values):
                return self._attend_varlen(query, scaling)
            return self._attend_padded(query, latest, scaling)
        out = []
        asked = query.reshape(b * self.heads, group * q, d) * scaling
        hidden = None
        if q > 1:
            seen = torch.ones(q, q, dtype=torch.bool, device=query.device).tril() if latest is None else latest
            hidden = ~seen.expand(b, q, q)
        for i, (start, n) in enumerate(zip(self._starts, self.lengths, strict=True)):
            logits = asked[i] @ self.flat_keys[start : start + n].t()
            if self.bias is not None:
                logits += self.bias[start : start + n]
            if hidden is not None:
                own = hidden[i // self.heads].repeat(group, 1)
                logits[:, n - q :] = logits[:, n - q :].masked_fill(own, -torch.inf)
            weights = logits.softmax(-1, dtype=torch.float32).to(asked.dtype)
            out.append(weights @ self.flat_values[start : start + n])
        return torch.stack(out).reshape(b, self.heads, group, q, -1).flatten(1, 2).transpose(1, 2).contiguous()

    def padded(self) -> tuple[Tensor, Tensor, Tensor]:
        """Keys and values `[B, G, L, d]` with padding in front, and what is added to the logits `[B, G, L]`."""
        low = torch.finfo(self.flat_keys.dtype).min
        device, longest = self.flat_keys.device, self.length
        at = torch.arange(longest, device=device) - longest
        index = (self._ends[:, None] + at).clamp_min(0)
        starts = torch.tensor(self._starts, device=device)[:, None]
        outside = self._ends[:, None] + at < starts
        added = torch.zeros(index.shape, dtype=self.flat_keys.dtype, device=device)
        if self.bias is not None:
            added = self.bias[index].to(added.dtype)
        added = added.masked_fill(outside, low)
        lanes = (-1, self.heads)
        return (
            self.flat_keys[index].unflatten(0, lanes),
            self.flat_values[index].unflatten(0, lanes),
            added.unflatten(0, lanes),
        )

    def _attend_varlen(self, query: Tensor, scaling: float) -> Tensor:
        """One call for all lanes, without padding."""
        if self._bounds is None:
            bounds = list(accumulate(self._rooms, initial=0))
            self._bounds = torch.tensor(bounds, dtype=torch.int32, device=query.device)
        lengths = (self._ends - self._bounds[:-1]).int()
        return varlen.attend(query, self.flat_keys, self.flat_values, self._bounds, lengths, self.length, scaling)

    def _attend_padded(self, query: Tensor, latest: Tensor | None, scaling: float) -> Tensor:
        """One call for all lanes, padded: on a GPU many calls cost more than padding that lives for one."""
        keys, values, added = self.padded()
        group, q = query.shape[1] // self.heads, query.shape[2]
        mask = added.repeat_interleave(group, 1)[:, :, None].expand(-1, -1, q, -1)
        if q > 1:
            low = torch.finfo(mask.dtype).min
            seen = torch.ones(q, q, dtype=torch.bool, device=query.device).tril()[None] if latest is None else latest
            mask = mask.clone()
            mask[..., -q:] = mask[..., -q:].masked_fill(~seen[:, None], low)
        keys, values = (x.repeat_interleave(group, 1) for x in (keys, values))
        out = torch.nn.functional.scaled_dot_product_attention(query, keys, values, mask, scale=scaling)
        return out.transpose(1, 2).contiguous()


def _laid_out(parts: list[Tensor], rooms: tuple[int, ...]) -> Tensor:
    made = parts[0].new_zeros(sum(rooms), *parts[0].shape[1:])
    start = 0
    for part, room in zip(parts, rooms, strict=True):
        made[start : start + part.shape[0]] = part
        start += room
    return made
