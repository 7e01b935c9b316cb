"""PackedSequence: the tokens of one LM forward, where they lie now, and what follows for positions and masks.

Outside, everything is counted in logical positions. Inside, each layer sees the slots that are left. This class knows
slots, masks, rotary embeddings and logical lengths; it knows nothing of plans, items or hooks.
"""

from collections.abc import Callable
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from transformers.masking_utils import create_causal_mask, packed_sequence_mask_function

from winnow.core.errors import UnsupportedError
from winnow.core.packing import Packing
from winnow.engine.cache import Past, Physical
from winnow.engine.versions import cache_keyword


class PackedSequence:
    """Tokens in slots, their positions and their masks.

    Args:
        packing: as the caller gave the tokens.
        lm: the language model, for its configuration and its rotary embedding.
        positions: `[B or 1, S]`, `[3 or 4, B, S]`, or None: counted from `before`.
        before: logical tokens in the cache.
        compact: survivors are renumbered without gaps; else they keep their true positions.
        segments: `[B, S]` the sample that each token belongs to, where a row holds several (padding-free training).
        has_cache: whether the LM was given a cache; without one, and without a mask, gapped positions would be read as
            packed samples.
    """

    def __init__(
        self,
        packing: Packing,
        lm: Any,
        *,
        positions: Tensor | None,
        before: int = 0,
        compact: bool = False,
        segments: Int[Tensor, "b s"] | None = None,
        has_cache: bool = True,
    ) -> None:
        self.packing = self.initial = packing
        self.lm, self.compact, self.segments, self.has_cache = lm, compact, segments, has_cache
        if positions is None:
            positions = torch.arange(before, before + packing.logical, device=packing.mask.device)[None]
        self.positions = positions.to(packing.mask.device)  # parts before the LM may be on another device
        self.touched = False
        self.position_of: Int[Tensor, "b p"] = packing.source
        self.at_lm: Packing | None = None  # the packing with which the LM was entered
        self.lm_slot_of: Int[Tensor, "b p"] | None = None
        self._memo: dict[Any, Any] = {}

    def place(self, row: int, slots: Int[Tensor, " m"], position_from: Int[Tensor, " m"]) -> None:
        """Rows that were made anew stand at `slots` and take the positions of the tokens at `position_from`."""
        if self.position_of is self.initial.source:
            self.position_of = self.position_of.clone()
        self.position_of[row, slots] = self.position_of[row, position_from]
        if self.at_lm is not None:
            self.lm_slot_of = self.lm_slots().clone()
            self.lm_slot_of[row, slots] = self.lm_slot_of[row, position_from]

    def select(
        self, hidden: Float[Tensor, "b p d"], kept: Bool[Tensor, "b p"], sizes: tuple[int, ...]
    ) -> tuple[Float[Tensor, "b q d"], Int[Tensor, "b p"]]:
        """Drop slots. Returns the rows that are left, and for each old slot its new one."""
        self.touched = True
        old = self.packing
        self.packing, slots = old.select(kept, sizes)
        self.position_of = self.position_of.gather(1, slots)
        if self.at_lm is not None:
            self.lm_slot_of = self.lm_slots().gather(1, slots)
        rows = hidden.gather(1, slots.to(hidden.device)[..., None].expand(-1, -1, hidden.shape[-1]))
        return rows, old.arrivals(slots)

    def enter_lm(self) -> None:
        """The LM starts with the slots of this moment; what layers get is counted from here."""
        self.at_lm = self.packing

    def lm_slots(self) -> Int[Tensor, "b p"]:
        """For each slot, the one with which the LM was entered."""
        if self.lm_slot_of is None:
            mask = self.at_lm.mask  # type: ignore[union-attr]
            self.lm_slot_of = torch.arange(mask.shape[1], device=mask.device).expand_as(mask)
        return self.lm_slot_of

    def position_ids(self, past: Past | None) -> Tensor:
        """What the LM is given as positions for these slots."""
        if self.compact:
            return self._renumbered(past)
        if not self.touched:
            return self.positions
        rows = self.packing.source.shape[0]
        given = self.positions
        index = self.position_of.to(given.device)
        if given.ndim == 2:
            return given.expand(rows, -1).gather(1, index)
        return given.expand(-1, rows, -1).gather(2, index.expand(given.shape[0], -1, -1))

    def _renumbered(self, past: Past | None) -> Int[Tensor, "b p"]:
        """1-D positions without gaps, from where the cache of these layers ends."""
        given = self.positions.expand(len(self.packing.sizes), -1)
        first = given.gather(1, self.initial.mask.to(torch.uint8).argmax(1)[:, None])
        ranks = (self.packing.mask.cumsum(1) - 1).clamp_min(0)
        offset = torch.zeros_like(first) if past is None else past.offset.to(first.device)[:, None]
        return first - offset + ranks

    def embeddings(
        self, given: tuple[Tensor, Tensor], hidden: Float[Tensor, "b p d"], past: Past | None
    ) -> tuple[Tensor, ...]:
        """cos and sin for the slots of a layer, from those that the LM made for the slots it was entered with."""
        if self.compact:
            return self.once(
                ("compact", self.packing, past),
                lambda: self.lm.rotary_emb(hidden, position_ids=self._renumbered(past)),
            )
        if self.packing is self.at_lm:
            return given
        rows, index = self.packing.source.shape[0], self.lm_slots()

        def gather() -> tuple[Tensor, ...]:
            at = index[..., None]
            return tuple(e.expand(rows, -1, -1).gather(1, at.to(e.device).expand(-1, -1, e.shape[-1])) for e in given)

        return self.once(("embeddings", self.packing, id(given[0])), gather)

    def mask2d(self, past_mask: Bool[Tensor, "b l"] | None, held: int) -> Bool[Tensor, "b n"] | None:
        """Real slots of a layer, those of its cache first; None when nothing pads, so that fused attention stays on."""
        if past_mask is None and not self.packing.padded:
            return None
        if held and past_mask is None:
            past_mask = torch.ones(len(self.packing.sizes), held, dtype=torch.bool, device=self.packing.mask.device)
        return self.packing.mask if past_mask is None else torch.cat([past_mask.bool(), self.packing.mask], 1)

    def lm_mask(self, hidden: Tensor, past_mask: Tensor | None, held: int) -> Tensor | None:
        """What the LM is given as its mask."""
        if self.segments is not None:
            return self.layer_mask(0, hidden, past_mask, held)
        mask = self.mask2d(past_mask, held)
        if mask is None and not self.has_cache:
            return torch.ones_like(self.packing.mask)
        return mask

    def layer_mask(self, layer: int, hidden: Tensor, past_mask: Tensor | None, held: int) -> Any:
        """The mask of one layer, as its attention implementation wants it."""

        def make() -> Any:
            options: dict[str, Any] = {cache_keyword(create_causal_mask): Physical(held) if held else None}
            if self.segments is not None:
                own = self.segments.expand(self.packing.source.shape[0], -1).gather(1, self.packing.source)
                options["and_mask_function"] = packed_sequence_mask_function(own.to(hidden.device))
            real = self.mask2d(past_mask, held)
            return create_causal_mask(
                config=self.lm.config,
                inputs_embeds=hidden,
                attention_mask=None if real is None else real.to(hidden.device),
                layer_idx=layer if held else None,
                **options,
            )

        return self.once(("mask", self.packing, id(past_mask), held, hidden.device), make)

    def dropped(self) -> Int[Tensor, " b"]:
        """Tokens of each row that are gone since the caller gave them."""
        return torch.tensor([a - b for a, b in zip(self.initial.sizes, self.packing.sizes, strict=True)])

    def to_logical(self, x: Float[Tensor, "b p d"], packing: Packing) -> Float[Tensor, "b s d"]:
        """Outputs at their logical length; a dropped position repeats the survivor before it."""
        if packing is self.initial or x.shape[1] != packing.width:
            return x  # as the caller gave them; or the model itself went on with the last token alone
        if packing.source is self.initial.source:
            return x  # nothing has moved: the tensor itself, through which gradients flow
        index = self.once(("logical", packing), packing.to_logical)
        return x.gather(1, index.to(x.device)[..., None].expand(-1, -1, x.shape[-1]))

    def once(self, key: Any, make: Callable[[], Any]) -> Any:
        """One computation for all layers that share it."""
        if key not in self._memo:
            self._memo[key] = make()
        return self._memo[key]


def packed_segments(positions: Tensor | None, config: Any) -> Int[Tensor, "b s"] | None:
    """The sample of each token, where positions start again within a row; None for ordinary rows.

    Only asked where transformers reads positions so: without a mask and without a cache. One host read.
    """
    if positions is None:
        return None
    if positions.ndim == 3:
        if positions.shape[0] != 4:
            return None  # three axes without text positions: transformers does not look for packed samples
        positions = positions[0]
    breaks = positions.diff(dim=-1) != 1
    if not bool(breaks.any()):
        return None
    if "flash" in (config._attn_implementation or ""):
        raise UnsupportedError(
            "rows that hold several samples (positions that start again) are not compressed under FlashAttention; "
            "use attn_implementation='sdpa', or pad the samples into a batch."
        )
    return torch.nn.functional.pad(breaks.long().cumsum(-1), (1, 0))


def check_segments(segments: Tensor | None, plan: Any) -> None:
    """Refuse plans that do not know what to do with rows that hold several samples.

    Args:
        plan: bound to the model.
    """
    if segments is None:
        return
    if plan.reads_text:
        raise UnsupportedError(
            f"{plan.plan} looks at the question, and rows that hold several samples (positions that start "
            "again) have several; use a method that looks at pictures only, or pad the samples into a batch."
        )
    if plan.plan.positions == "compact":
        raise UnsupportedError(
            "positions=compact is not defined for rows that hold several samples; use positions=keep."
        )


def row_mask(
    given: Tensor | None, rows: int, length: int, device: torch.device
) -> tuple[Bool[Tensor, "b s"], tuple[int, ...], bool, Bool[Tensor, "b s"] | None]:
    """Real tokens of what is new, their numbers on the host, whether padding stands on the right, and a host copy.

    A single decoded token is real, so that decoding never asks the device.
    """
    if given is None or length == 1:
        return torch.ones(rows, length, dtype=torch.bool, device=device), (length,) * rows, False, None
    mask = given[:, -length:].to(device).bool()
    host = mask.cpu()
    right = bool(host[:, 0].all()) and not bool(host[:, -1].all())
    return mask, tuple(host.sum(1).tolist()), right, host
