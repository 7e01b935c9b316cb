"""What the language model's attention says about items: computed for a few rows, in the slots of the moment."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from winnow.core.packing import Packing
from winnow.core.signal import LMAttention, LMAttentionMass, Signal
from winnow.signals.attention import attention_rows

TILE = 64  # query rows at a time, so that no tile outgrows the queries of a head


class Listener:
    """Reads signals from the queries and keys of one LM layer.

    Args:
        packing: the slots that the queries stand in.
        past: `[B, L]` mask of the keys before them (None: all real), and their number.
        questions: logical span of the question of each row.
        items: content slots of each row's items.
        ends: where the last item of each row ends; text behind it is invisible to visual rows.
    """

    def __init__(
        self,
        packing: Packing,
        past: Tensor | None,
        before: int,
        questions: Sequence[tuple[int, int]],
        items: Sequence[Tensor],
        ends: Sequence[int],
    ) -> None:
        self.packing, self.past, self.before = packing, past, before
        self.questions, self.items, self.ends = questions, items, ends

    def read(self, signal: Signal, q: Tensor, k: Tensor, scaling: float) -> Tensor:
        """`[B, P]` for attention to the tokens of the chunk, `[B]` for a mass."""
        if isinstance(signal, LMAttention):
            if signal.rows == "last":
                return self._last(q, k, scaling)
            at = self._question_slots()
            return torch.stack([self._rows(q, k, scaling, b, slots) for b, slots in enumerate(at)])[:, self.before :]
        if isinstance(signal, LMAttentionMass):
            return torch.stack([self._mass(signal, q, k, scaling, b) for b in range(q.shape[0])])
        raise TypeError(signal)

    def last_slots(self) -> Tensor:
        """`[B]` slot of the last real token of each row."""
        sizes = torch.tensor(self.packing.sizes, device=self.packing.source.device)
        return sizes - 1 if self.packing.right else torch.full_like(sizes, self.packing.width - 1)

    def _visible(self, rows: Tensor) -> Tensor:
        """`[b, R, K]` the keys that query slots `rows [b, R]` may see."""
        slots = torch.arange(self.packing.width, device=rows.device)
        seen = (slots <= rows[..., None]) & self.packing.mask[:, None]
        if not self.before:
            return seen
        past = self.past
        if past is None:
            past = torch.ones(seen.shape[0], self.before, dtype=torch.bool, device=rows.device)
        return torch.cat([past[:, None].expand(-1, rows.shape[1], -1), seen], -1)

    def _last(self, q: Tensor, k: Tensor, scaling: float) -> Float[Tensor, "b p"]:
        at = self.last_slots()
        rows = q if q.shape[2] == 1 else q.gather(2, at[:, None, None, None].expand(-1, q.shape[1], 1, q.shape[3]))
        seen = self._visible(at[:, None])[:, None]
        return attention_rows(rows, k, scaling, seen).mean(1)[:, 0, self.before :]

    def _question_slots(self) -> list[Tensor]:
        slots = self.packing.to_logical()
        return [slots[b, start:end] for b, (start, end) in enumerate(self.questions)]

    def _rows(self, q: Tensor, k: Tensor, scaling: float, b: int, slots: Tensor) -> Float[Tensor, " k"]:
        """Attention of some rows of sample b, mean over heads and rows, in tiles of rows."""
        total = k.new_zeros(k.shape[2], dtype=torch.promote_types(k.dtype, torch.float32))
        own = self._row_view(b)
        for part in slots.split(TILE):
            seen = own._visible(part[None])[:, None]
            total += attention_rows(q[b : b + 1, :, part], k[b : b + 1], scaling, seen).mean(1)[0].sum(0)
        return total / max(1, slots.shape[0])

    def _row_view(self, b: int) -> Listener:
        p = self.packing
        at = slice(b, b + 1)
        one = Packing(p.source[at], p.mask[at], p.real[at], p.sizes[at], p.logical, p.right)
        past = None if self.past is None else self.past[at]
        return Listener(one, past, self.before, self.questions[at], self.items[at], self.ends[at])

    def _mass(self, signal: LMAttentionMass, q: Tensor, k: Tensor, scaling: float, b: int) -> Float[Tensor, ""]:
        slots = {"question": self._question_slots()[b], "items": self.items[b]}
        rows, keys = slots[signal.rows], slots[signal.keys]
        unseen = (signal.rows, signal.keys) == ("items", "question") and self.questions[b][0] >= self.ends[b]
        if unseen or not rows.shape[0] or not keys.shape[0]:
            return q.new_zeros((), dtype=torch.promote_types(q.dtype, torch.float32))
        return self._rows(q, k, scaling, b, rows)[self.before :][keys].sum()
