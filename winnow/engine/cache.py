"""The logical face of a reduced cache, and what the engine remembers on it between forwards.

To callers, a cache reports its logical length, so that `generate`, multi-turn use and stepping by hand work unchanged.
Inside, each layer holds only what survived, and masks are made from those physical lengths.
"""

import functools
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor
from transformers import cache_utils
from transformers.cache_utils import (
    Cache,
    DynamicCache,
    DynamicLayer,
    DynamicSlidingWindowLayer,
    LinearAttentionAndFullAttentionLayer,
    LinearAttentionAndSlidingWindowAttentionLayer,
    LinearAttentionLayer,
    StaticLayer,
)

from winnow.cache.layer import HeldLayer
from winnow.core.errors import UnsupportedError, WinnowError


@dataclass(eq=False)
class Past:
    """What one layer's cache holds; layers that hold the same slots share one object.

    Attributes:
        mask: `[B, L]` True for real slots; None if none pads.
        offset: `[B]` what a logical position exceeds the position used in this layer by (0 under `keep`).
        logical: `[B, L']` the logical positions of the first slots, up to the position `until`; what came later is
            without gaps. None where the language model is called with the slots that are left.
    """

    mask: Tensor | None
    offset: Tensor
    logical: Tensor | None = None
    until: int = 0

    def rows(self, index: Tensor) -> "Past":
        def at(x: Tensor | None) -> Tensor | None:
            return None if x is None else x[index.to(x.device)]

        return replace(self, mask=at(self.mask), offset=at(self.offset), logical=at(self.logical))  # type: ignore[arg-type]

    def columns(self, before: int) -> Tensor:
        """`[B, L]` the logical position of every slot, of `before` tokens that the cache has seen."""
        if self.logical is None:
            raise WinnowError("this cache was reduced by another way of calling the language model; start a new one.")
        later = torch.arange(self.until, before, device=self.logical.device)
        return torch.cat([self.logical, later.expand(self.logical.shape[0], -1)], 1)

    def cropped(self, count: int, logical: int) -> "Past":
        """Without its last tokens; `logical` of them are left."""
        mask = None if self.mask is None else self.mask[:, :-count]
        cut = max(0, self.until - logical)
        known = self.logical if self.logical is None or not cut else self.logical[:, :-cut]
        return Past(mask, self.offset, known, self.until - cut)


@dataclass(eq=False)
class CacheState:
    """Request state, on the cache object.

    Attributes:
        attachment: of the plan that reduced it; a cache must not go on without it.
        padded: whether what any layer holds has padding.
        first_other: the first layer that holds other tokens than layer 0; None if all hold the same.
        inside: while the language model runs, the cache gives the lengths that each layer really holds.
        logical: tokens seen so far, as the caller counts them.
        prompt: where the last reduced item ends; what lies before cannot be cropped.
        layers: by LM layer; a layer without entry holds everything.
        rope_deltas: `[B, 1]` for 3-D positions: belongs to the request, not to the module.
        real: `[B]` real tokens seen so far; needed with 3-D positions.
        stretches: of each row, how its positions were stretched; None where none was.
        memories: of each row, what it reads beside the sequence; None where nothing is read. See `cross_reads`.
        talk: the conversation, where pictures are to be selected again; see `turns`.
        ledger: of the request that filled it.
    """

    attachment: Any
    logical: int = 0
    prompt: int = 0
    layers: dict[int, Past] = field(default_factory=dict)
    rope_deltas: Tensor | None = None
    real: Tensor | None = None
    inside: bool = False
    padded: bool = False
    first_other: int | None = None
    stretches: tuple[Any, ...] | None = None
    memories: tuple[Any, ...] | None = None
    talk: Any = None
    ledger: Any = None

    @property
    def rows(self) -> int | None:
        """Rows of the batch; None where nothing belongs to one."""
        offsets = [past.offset for past in self.layers.values()]
        return next((len(own) for own in (*offsets, self.stretches, self.memories, self.real) if own is not None), None)

    def settle(self, depth: int) -> None:
        """Note what decoded tokens ask for at every step.

        Args:
            depth: layers of the language model.
        """
        first = self.layers.get(0)
        self.padded = any(past.mask is not None for past in self.layers.values())
        self.first_other = next((i for i in range(depth) if self.layers.get(i) is not first), None)

    def __deepcopy__(self, memo: dict[int, Any]) -> "CacheState":
        made = CacheState(self.attachment, self.logical, self.prompt, rope_deltas=self.rope_deltas, real=self.real)
        made.layers = dict(self.layers)  # entries are never changed in place
        made.padded, made.first_other = self.padded, self.first_other
        made.stretches, made.memories = self.stretches, self.memories
        made.talk, made.ledger = None if self.talk is None else self.talk.copy(), self.ledger
        return made

    def select(self, index: Tensor) -> None:
        """Reorder or repeat the batch."""
        moved = {id(past): past.rows(index) for past in self.layers.values()}
        self.layers = {i: moved[id(past)] for i, past in self.layers.items()}
        if self.talk is not None:
            self.talk.lost = "its rows were moved or repeated (beams do so)"
        if self.stretches is not None:
            self.stretches = tuple(self.stretches[row] for row in index.tolist())
        if self.memories is not None:
            self.memories = tuple(self.memories[row] for row in index.tolist())
        if self.rope_deltas is not None and self.real is not None:
            at = index.to(self.real.device)
            self.rope_deltas, self.real = self.rope_deltas[at], self.real[at]


class LogicalLength:
    """Mixed into the class of a cache once it holds a reduced prompt."""

    _winnow: CacheState

    def get_seq_length(self, layer_idx: int = 0) -> int:
        return super().get_seq_length(layer_idx) if self._winnow.inside else self._winnow.logical  # type: ignore[misc]

    def get_mask_sizes(self, query_length: int, layer_idx: int) -> tuple[int, int]:
        if self._winnow.inside:
            return super().get_mask_sizes(query_length, layer_idx)  # type: ignore[misc]
        return self._winnow.logical + query_length, 0

    def update(self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any) -> Any:
        if not self._winnow.attachment.attached:
            raise WinnowError(
                "this cache holds a compressed prompt, but the model is no longer compressed; "
                "compress it again with the same plan before you continue, or start with a new cache."
            )
        return super().update(key_states, value_states, layer_idx, *args, **kwargs)  # type: ignore[misc]

    def crop(self, tokens_to_remove: int) -> None:
        """Remove the last |n| tokens (n < 0), or all behind the first n (n > 0, deprecated by transformers)."""
        state = self._winnow
        count = max(0, state.logical - tokens_to_remove) if tokens_to_remove > 0 else -tokens_to_remove
        if state.logical - count < state.prompt:
            raise WinnowError(
                f"cannot crop {count} of {state.logical} tokens: the first {state.prompt} are a compressed "
                "prompt, which cannot be cut; start with a new cache."
            )
        if count == 0:
            if any(getattr(layer, "record_past", False) for layer in self.layers):  # type: ignore[attr-defined]
                super().crop(0)  # type: ignore[misc]  # what was recorded for this crop is let go
            return
        if not all(_croppable(layer) for layer in self.layers):  # type: ignore[attr-defined]
            raise WinnowError(
                f"cannot crop {count} tokens: layers with a sliding window or a linear state have forgotten what stood "
                "before them; start with a new cache, or call activate_past_recording() on it before its first token."
            )
        super().crop(-count)  # type: ignore[misc]
        state.logical -= count
        if state.talk is not None:
            state.talk.crop(count)
        if state.real is not None:
            state.real = state.real - count
        cut = {id(past): past.cropped(count, state.logical) for past in state.layers.values()}
        state.layers = {i: cut[id(past)] for i, past in state.layers.items()}

    def reset(self) -> None:
        super().reset()  # type: ignore[misc]
        fresh = CacheState(self._winnow.attachment)
        self._winnow.__dict__.update(fresh.__dict__)

    def reorder_cache(self, beam_idx: Tensor) -> None:
        super().reorder_cache(beam_idx)  # type: ignore[misc]
        self._winnow.select(beam_idx)

    def batch_select_indices(self, indices: Tensor) -> None:
        super().batch_select_indices(indices)  # type: ignore[misc]
        self._winnow.select(indices)

    def batch_repeat_interleave(self, repeats: int) -> None:
        super().batch_repeat_interleave(repeats)  # type: ignore[misc]
        rows = self._winnow.rows
        if rows is not None:
            self._winnow.select(torch.arange(rows).repeat_interleave(repeats))


def _croppable(layer: Any) -> bool:
    if isinstance(layer, LinearAttentionLayer):
        return False
    whole = not getattr(layer, "is_sliding", False) or layer.get_seq_length() < layer.sliding_window
    return whole or getattr(layer, "record_past", False)


@functools.cache
def _logical_class(plain: type[Cache]) -> type[Cache]:
    return type(f"Logical{plain.__name__}", (LogicalLength, plain), {})


def state_of(cache: Any) -> CacheState | None:
    """The engine's state on a cache, if its prompt was reduced."""
    return getattr(cache, "_winnow", None)


def tag(cache: Cache, attachment: Any, logical: int) -> CacheState:
    """Give a cache its logical face; `logical` is what it held before this forward."""
    known = state_of(cache)
    if known is not None:
        return known
    cache.__class__ = _logical_class(type(cache))  # type: ignore[arg-type]
    state = CacheState(attachment, logical)
    cache._winnow = state  # type: ignore[attr-defined]
    return state


# Storages that can hold a different number of tokens in each layer. Linear layers hold a state and no tokens; from 5.24
# on, layers that share the keys of another one hold nothing.
_HOLD = (
    DynamicLayer,
    DynamicSlidingWindowLayer,
    LinearAttentionLayer,
    LinearAttentionAndFullAttentionLayer,
    LinearAttentionAndSlidingWindowAttentionLayer,
    HeldLayer,
    *filter(None, (getattr(cache_utils, "DummyLayer", None),)),
)


def check_cache(cache: Cache, windowed: bool) -> None:
    """Refuse storages that cannot hold a different number of tokens in each layer.

    Args:
        windowed: whether the model has layers that attend to a window, so that caches of windows are its own.
    """
    for layer in cache.layers:
        if isinstance(layer, StaticLayer):
            raise UnsupportedError(
                "a static cache has one fixed length for all layers and cannot hold a compressed prompt; "
                "use the default dynamic cache (drop cache_implementation='static')."
            )
        if type(layer) not in _HOLD or (getattr(layer, "is_sliding", False) and not windowed):
            raise UnsupportedError(
                f"a cache with {type(layer).__name__} cannot hold a compressed prompt; use the default dynamic cache."
            )
    # Caches of some assisted decoders shift their queries behind what they hold.
    if not isinstance(cache, DynamicCache) or type(cache).get_query_offset is not Cache.get_query_offset:
        raise UnsupportedError(
            f"a {type(cache).__name__} cannot hold a compressed prompt; use the default dynamic cache."
        )


def held_by(cache: Any, index: int) -> int:
    """Slots of a layer's cache that its attention reads; of a compressed one, as if nothing were missing."""
    if cache is None or index >= len(cache.layers):
        return 0
    layer = cache.layers[index]
    if isinstance(layer, HeldLayer):
        return layer.seen
    keys = getattr(layer, "keys", None)
    if keys is None or not keys.numel():
        return 0
    window = getattr(layer, "sliding_window", None)
    return keys.shape[-2] if window is None else min(keys.shape[-2], window - 1)


class Physical:
    """What mask making asks of a cache, answered with the lengths that one layer really holds."""

    is_compileable = False

    def __init__(self, length: int) -> None:
        self.length = length

    def get_query_offset(self, layer_idx: int = 0) -> int:
        return self.length

    def get_mask_sizes(self, query_length: int, layer_idx: int) -> tuple[int, int]:
        return self.length + query_length, 0
