"""What a pass through the language model leaves on its cache: what each layer holds from now on, and where."""

from typing import Any

import torch
from torch import Tensor

from winnow.core.packing import Packing
from winnow.engine.cache import CacheState, Past


def remember_layers(lm: Any, state: CacheState) -> None:
    """What each layer's cache holds from now on.

    Args:
        lm: the pass, whose layers have run.
    """
    if not lm.tokens.touched and not state.padded and not lm.tokens.packing.padded:
        return  # each layer has grown by the same real tokens: what is remembered of it still holds
    known: dict[Any, Past] = {}
    for index in range(len(lm.bound.layers)):
        packing, past = lm.packing_at(index), state.layers.get(index)
        if past is None and packing is lm.tokens.initial:
            continue  # nothing was ever dropped: the caller's mask says it all
        # Layers with a window have forgotten what others still hold.
        key = (id(packing), id(past), None if lm.whole is None else lm.held_before[index])
        if key not in known:
            known[key] = _next_past(lm, packing, past, index)
        state.layers[index] = known[key]
    state.settle(len(lm.bound.layers))


def _next_past(lm: Any, packing: Packing, past: Past | None, index: int) -> Past:
    before = lm.past_mask(past)
    offset = torch.zeros(len(packing.sizes), dtype=torch.int64) if past is None else past.offset
    if lm.tokens.compact and packing is not lm.tokens.initial:
        gone = [a - b for a, b in zip(lm.tokens.initial.sizes, packing.sizes, strict=True)]
        offset = offset + torch.tensor(gone).to(offset.device)
    mask = None
    if before is not None or packing.padded:
        if before is None:
            held = lm.held(index) - packing.width if lm.whole is None else lm.held_before[index]
            before = torch.ones(len(packing.sizes), held, dtype=torch.bool, device=packing.mask.device)
        mask = torch.cat([before.to(packing.mask.device), packing.mask], 1)
    elif past is not None and offset is past.offset and (lm.whole is None or packing is lm.tokens.initial):
        return past
    if lm.whole is None:
        return Past(mask, offset)
    return Past(mask, offset, *_columns(lm, packing, past, index))


def _columns(lm: Any, packing: Packing, past: Past | None, index: int) -> tuple[Tensor, int]:
    """The logical positions of a layer's slots from now on, and how far they are listed."""
    if packing is lm.tokens.initial and past is not None:
        return past.logical, past.until  # type: ignore[return-value]
    if past is not None:
        old = past.columns(lm.before).to(packing.source.device)
    else:
        first = lm.before - lm.held_before[index]
        old = torch.arange(first, lm.before, device=packing.source.device).expand(len(packing.sizes), -1)
    return torch.cat([old, lm.before + packing.source], 1), lm.before + lm.tokens.initial.logical


def remember_positions(lm: Any, state: CacheState) -> None:
    """With 3-D positions: how many real tokens each row has, and how far its positions run ahead of them."""
    real = lm.tokens.initial.mask.sum(1)
    state.real = real if state.real is None else state.real + real
    if lm.items:
        axes = lm.tokens.positions
        axes = axes[None] if axes.ndim == 2 else axes[-lm.bound.family.axes :]
        axes = axes.expand(-1, len(lm.tokens.initial.sizes), -1)
        last = axes.masked_fill(~lm.tokens.initial.mask, 0).amax((0, 2))
        state.rope_deltas = (last + 1 - state.real)[:, None]
