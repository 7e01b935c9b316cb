"""WholeCall: how layers are served where the language model is called with the whole sequence.

The model makes masks, rotary embeddings and whatever else its layers take for all logical positions, as it was trained:
sliding windows and chunks count true positions, and masks that let the tokens of a picture see each other stay so. Each
layer is then given the part of it that belongs to the slots that are left.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor, nn

from winnow.core.errors import UnsupportedError
from winnow.engine.cache import Past
from winnow.engine.packed import PackedSequence

MASK = "attention_mask"


class WholeCall:
    """The arguments of layers, for the slots of the moment.

    Args:
        tokens: that the layers read.
        before: logical tokens in the cache.
        flash: whether attention reads gapped positions as packed samples, and takes 2-D masks.
    """

    def __init__(self, tokens: PackedSequence, before: int, flash: bool) -> None:
        self.tokens, self.before, self.flash = tokens, before, flash
        self.length = tokens.initial.logical

    def hidden(self, hidden: Tensor) -> Tensor:
        """`[…, S, D]` what the first layer is given → `[…, P, D]` of the slots that are left."""
        return self._rows(hidden, hidden.ndim - 2) if self.tokens.touched else hidden

    def embeds(self, given: Tensor, rows: Tensor) -> Tensor:
        """`[B, S, D]` what the language model is called with: rows that were made anew stand at their slots' places."""
        at = self.tokens.packing.source[..., None].expand(-1, -1, given.shape[-1])
        return given.scatter(1, at.to(given.device), rows)

    def layer(
        self,
        module: nn.Module,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        past: Past | None,
        held: int,
        linear: bool,
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """The arguments of a layer behind its hidden states.

        Args:
            args: without the hidden states.
            past: what its cache holds; None: what the caller gave.
            held: slots that its cache holds before this forward.
            linear: whether it keeps a state instead of keys and values.
        """
        names = _behind_hidden(type(module).forward)
        named = [self._cut(name, x, past, held, linear) for name, x in zip(names, args, strict=False)]
        changed = {name: self._cut(name, x, past, held, linear) for name, x in kwargs.items()}
        if MASK not in names[: len(args)] and MASK not in changed:
            changed[MASK] = self.mask(None, past, held, linear)
        return tuple(named), changed

    def _cut(self, name: str, value: Any, past: Past | None, held: int, linear: bool) -> Any:
        if name == MASK:
            return self.mask(value, past, held, linear)
        if name == "position_ids" and self.flash:
            return None
        if not self.tokens.touched:
            return value
        positions = "position" in name
        return self._part(value, positions) if not positions else self._once(("part", id(value)), value)

    def _once(self, key: Any, value: Any) -> Any:
        # The value is held as well, so that its id stays its own.
        return self.tokens.once((key, self.tokens.packing), lambda: (value, self._part(value, True)))[1]

    def _part(self, value: Any, positions: bool) -> Any:
        """What has a row for each logical position, cut; anything else as it is.

        Positions go with the token that a row stands for, everything else with the row itself.
        """
        if isinstance(value, Tensor):
            dim = self._sequence_dim(value)
            return value if dim is None else self._rows(value, dim, positions)
        if type(value) in (tuple, list):
            return type(value)(self._part(x, positions) for x in value)
        if type(value) is dict:
            return {k: self._part(x, positions) for k, x in value.items()}
        return value

    def _sequence_dim(self, value: Tensor) -> int | None:
        batch = len(self.tokens.initial.sizes)
        if value.ndim >= 2 and value.shape[1] == self.length and value.shape[0] in (1, batch):
            return 1
        if value.ndim >= 3 and value.shape[-2] == self.length:
            return value.ndim - 2
        return None

    def _rows(self, value: Tensor, dim: int, positions: bool = False) -> Tensor:
        """Gather along the sequence; the batch lies just before it."""
        index = self.tokens.lm_slots() if positions else self.tokens.packing.source
        index = index.to(value.device)
        shape = [1] * value.ndim
        shape[dim - 1], shape[dim] = index.shape
        sizes = list(value.shape)
        sizes[dim - 1] = index.shape[0]
        wide = value.expand(sizes)
        sizes[dim] = index.shape[1]
        return wide.gather(dim, index.reshape(shape).expand(sizes))

    def mask(self, given: Any, past: Past | None, held: int, linear: bool) -> Any:
        """The mask of a layer, from the one that it was given for all logical positions.

        None, where attention is causal and nothing pads. `[B, S]` for linear layers, `[B, L + P]` for flash attention,
        else `[B, 1, P, L + P]`.
        """
        if given is not None and not isinstance(given, Tensor):
            raise UnsupportedError(
                f"masks of the kind {type(given).__name__} (flex_attention) cannot be cut to the tokens that are kept; "
                "use attn_implementation='sdpa'."
            )
        key = ("mask", self.tokens.packing, id(past), id(given), held, linear)
        return self.tokens.once(key, lambda: (given, self._mask(given, past, held, linear)))[1]

    def _mask(self, given: Tensor | None, past: Past | None, held: int, linear: bool) -> Tensor | None:
        packing = self.tokens.packing
        if linear:
            return self._linear_mask(given)
        gaps = None if past is None or past.mask is None else past.mask[:, past.mask.shape[1] - held :]
        padded = packing.padded and packing is not self.tokens.initial
        if given is None and gaps is None and not padded:
            return None
        valid = packing.mask
        if held:
            ones = torch.ones(len(packing.sizes), held, dtype=torch.bool, device=valid.device)
            valid = torch.cat([ones if gaps is None else gaps.to(valid.device), valid], 1)
        if self.flash or (given is not None and given.ndim == 2):
            return valid if given is None else self._columns_of(given, past, held) & valid.to(given.device)
        if given is None:
            slots = torch.arange(valid.shape[1], device=valid.device)
            causal = slots[None, :] <= slots[held:, None]
            return valid[:, None, None] & causal
        if packing is self.tokens.at_lm and past is None and given.shape[-1] == held + packing.width:
            return given
        cut = self._rows_of(given)
        cut = cut.gather(3, self._columns(given, past, held)[:, None, None].expand(*cut.shape[:3], -1))
        if gaps is None and not padded:
            return cut
        valid = valid.to(cut.device)
        if cut.dtype == torch.bool:
            return cut & valid[:, None, None]
        return cut.masked_fill(~valid[:, None, None], torch.finfo(cut.dtype).min)

    def _linear_mask(self, given: Tensor | None) -> Tensor | None:
        packing = self.tokens.packing
        if packing is self.tokens.at_lm:
            return given
        if given is None:
            return packing.mask if packing.padded else None
        source, mask = packing.source.to(given.device), packing.mask.to(given.device)
        return given[:, given.shape[1] - self.length :].gather(1, source) * mask

    def _rows_of(self, given: Tensor) -> Tensor:
        """`[B, 1, S, K]` → `[B, 1, P, K]`."""
        packing = self.tokens.packing
        wide = given.expand(len(packing.sizes), -1, -1, -1)
        # Some models go on with the last token alone, once no later layer needs the keys of the others.
        if packing is self.tokens.at_lm or wide.shape[2] != self.length:
            return wide
        index = packing.source.to(given.device)[:, None, :, None]
        return wide.gather(2, index.expand(-1, wide.shape[1], -1, wide.shape[3]))

    def _columns_of(self, given: Tensor, past: Past | None, held: int) -> Tensor:
        wide = given.expand(len(self.tokens.packing.sizes), -1)
        return wide.gather(1, self._columns(given, past, held)).bool()

    def _columns(self, given: Tensor, past: Past | None, held: int) -> Int[Tensor, "b n"]:
        """The column of a mask over logical positions behind each slot of the cache, and of this forward."""
        total = self.before + self.length
        offset = total - given.shape[-1]  # a sliding cache that was never cut forgets its first positions
        own = self.before + self.tokens.packing.source
        if held:
            old = torch.arange(self.before - held, self.before, device=own.device).expand(own.shape[0], -1)
            if past is not None:
                old = past.columns(self.before)
                old = old[:, old.shape[1] - held :].to(own.device)
            own = torch.cat([old, own], 1)
        return (own - offset).clamp_min(0).to(given.device)


@functools.cache
def _behind_hidden(forward: Callable[..., Any]) -> tuple[str, ...]:
    """The names of what a layer takes behind its hidden states; asked for every layer of every decoded token."""
    return tuple(inspect.signature(forward).parameters)[2:]
