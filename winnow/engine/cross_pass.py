"""CrossPass: a plan where pictures are keys and values of cross-attention layers, and not tokens of the sequence.

The language model is given the states of all pictures and a mask of which words read which of them. Both are cut to
what is kept; the mask at every decoded token as well, because the model makes it for all pictures each time. Keys have
no positions here, so that nothing else knows of it.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Bool, Int
from torch import Tensor
from transformers.cache_utils import Cache

from winnow.core.errors import UnsupportedError, WinnowError
from winnow.core.layout import PAD, SEPARATOR, Layout
from winnow.core.ledger import ItemLedger, Ledger, add_notes
from winnow.engine.cache import check_cache
from winnow.engine.flops import cross_flops
from winnow.engine.item_tokens import LMTokens, content_mask, rows_of
from winnow.engine.ledgers import ledger_of
from winnow.engine.packed import row_mask
from winnow.engine.request import Request
from winnow.engine.runner import Change, StepRunner

STATES, MASK = "cross_attention_states", "cross_attention_mask"


@dataclass(eq=False)
class CrossKept:
    """What the cross-attention layers of a cache hold.

    Attributes:
        attachment: of the plan that reduced it.
        index: `[B, K]` which of the given keys each one is.
        valid: `[B, K]` which of them are there; the others fill up rows that hold fewer. None: all are.
    """

    attachment: Any
    index: Int[Tensor, "b k"]
    valid: Bool[Tensor, "b k"] | None

    def mask(self, given: Tensor | None, like: Tensor) -> Tensor | None:
        """`[B, 1, S, N]` → `[B, 1, S, K]`, additive; None where every word reads all that is there."""
        if given is None:
            if self.valid is None:
                return None
            given, cut = like, like.new_zeros(self.index.shape[0], 1, 1, self.index.shape[1])
        else:
            index = self.index.to(given.device)[:, None, None]
            cut = given.gather(3, index.expand(-1, 1, given.shape[2], -1))
        if self.valid is None:
            return cut
        return cut.masked_fill(~self.valid.to(cut.device)[:, None, None], torch.finfo(cut.dtype).min)

    def __deepcopy__(self, memo: dict[int, Any]) -> CrossKept:
        return CrossKept(self.attachment, self.index, self.valid)

    def select(self, index: Tensor) -> None:
        """Reorder or repeat the batch."""
        at = index.to(self.index.device)
        self.index = self.index[at]
        self.valid = None if self.valid is None else self.valid[at]


class CrossCache:
    """Mixed into the class of a cache whose cross-attention layers hold reduced pictures."""

    _winnow_cross: CrossKept

    def update(self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any) -> Any:
        if not self._winnow_cross.attachment.attached:
            raise WinnowError(
                "this cache holds compressed pictures, but the model is no longer compressed; compress it again with "
                "the same plan before you continue, or start with a new cache."
            )
        return super().update(key_states, value_states, layer_idx, *args, **kwargs)  # type: ignore[misc]

    def crop(self, *args: Any, **kwargs: Any) -> None:
        raise WinnowError(
            "a cache with pictures in cross-attention layers cannot be cropped: their keys would be cut as if they "
            "were words; start with a new cache."
        )

    def reorder_cache(self, beam_idx: Tensor) -> None:
        super().reorder_cache(beam_idx)  # type: ignore[misc]
        self._winnow_cross.select(beam_idx)

    def batch_select_indices(self, indices: Tensor) -> None:
        super().batch_select_indices(indices)  # type: ignore[misc]
        self._winnow_cross.select(indices)

    def batch_repeat_interleave(self, repeats: int) -> None:
        super().batch_repeat_interleave(repeats)  # type: ignore[misc]
        rows = self._winnow_cross.index.shape[0]
        self._winnow_cross.select(torch.arange(rows).repeat_interleave(repeats))


@functools.cache
def _cross_class(plain: type[Cache]) -> type[Cache]:
    return type(f"Cross{plain.__name__}", (CrossCache, plain), {})


def kept_of(cache: Any) -> CrossKept | None:
    """What was kept of the pictures that a cache holds, if they were reduced."""
    return getattr(cache, "_winnow_cross", None)


class CrossPass:
    """One forward of a language model that reads pictures by cross-attention.

    Args:
        request: to which it belongs.
        arguments: the keyword arguments of the language model.
    """

    def __init__(self, request: Request, arguments: dict[str, Any]) -> None:
        self.request, self.bound, self.arguments = request, request.bound, arguments
        self.cache = arguments.get(self.bound.cache_name)
        self.kept = kept_of(self.cache)
        self.items: list[LMTokens] = []
        self.notes: dict[str, Any] = {}
        self.given = 0  # keys of each row, as the model gives them
        self.counts: list[int] = []  # those that are left

    def enter(self) -> dict[str, Any] | None:
        """The arguments with pictures reduced; None: they go on as they are."""
        states, mask = self.arguments.get(STATES), self.arguments.get(MASK)
        if states is None:
            like = next(self.bound.lm.parameters())
            return None if self.kept is None else {**self.arguments, MASK: self.kept.mask(mask, like)}
        if self.request.plan.plan.methods:
            self._check()
        elif self.kept is None and self.request.called.get("aspect_ratio_ids") is None:
            return None
        rows = states.reshape(self._words.shape[0], -1, states.shape[-1])
        self.given = rows.shape[1]
        self.counts = [self.given] * rows.shape[0]
        kept = torch.ones(rows.shape[:2], dtype=torch.bool, device=rows.device)
        idle = self._place_items(rows)
        with self.request.clock.phase("select"):
            merged = self._run(rows, kept)
        for item in self.items:
            if item.count < item.n_visual and (at := idle.pop(item.row, None)) is not None:
                kept[item.row, at] = False
                self.counts[item.row] -= at.shape[0]
        if merged is rows and min(self.counts) == self.given:
            return None
        self.kept = self._as_kept(kept)
        index = self.kept.index[..., None].expand(-1, -1, rows.shape[2])
        return {**self.arguments, STATES: merged.gather(1, index), MASK: self.kept.mask(mask, rows)}

    @property
    def _words(self) -> Tensor:
        """`[B, S, …]` what the language model is called with."""
        ids = self.arguments.get("input_ids")
        return self.arguments["inputs_embeds"] if ids is None else ids

    def _check(self) -> None:
        name = self.bound.info.model
        if self.request.called.get("pixel_values") is None:
            raise UnsupportedError(
                f"{name} was given cross_attention_states; which pictures they are of is not known. Pass pixel_values."
            )
        if self.cache is None:
            return
        check_cache(self.cache, windowed=False)
        held = [i for i in self.bound.family.cross_layers(self.bound.model) if i < len(self.cache.layers)]
        if any(getattr(self.cache.layers[i], "keys", None) is not None for i in held):
            raise UnsupportedError(
                f"{name}: this cache holds pictures already, and the model's mask of a later call leaves them out; "
                "give all pictures of a conversation at once, with a new cache."
            )

    def _place_items(self, rows: Tensor) -> dict[int, Tensor]:
        """The items, and for each row the keys that stand for nothing: empty tiles, and places without a picture."""
        idle: dict[int, Tensor] = {}
        layouts = self.bound.family.cross_layouts(self.bound.model, self.request.called)
        for row, own in enumerate(layouts):
            width, empty = self.given // max(1, len(own)), []
            for number, layout in enumerate(own):
                start = number * width
                if layout is None:
                    empty.append(torch.arange(start, start + width))
                    continue
                if layout.n != width:
                    raise UnsupportedError(
                        f"{self.bound.info.model} gave {width} states for a picture where {layout.n} were expected."
                    )
                empty.append(start + torch.from_numpy((layout.kind == PAD).nonzero()[0]))
                self.items.append(self._item(row, number, layout, start, rows.device))
            if empty:
                idle[row] = torch.cat(empty).to(rows.device)
        return idle

    @staticmethod
    def _item(row: int, number: int, layout: Layout, start: int, device: torch.device) -> LMTokens:
        slots = start + content_mask(layout).nonzero()[:, 0].to(device)
        separators = start + torch.from_numpy((layout.kind == SEPARATOR).nonzero()[0]).to(device)
        n, ids = layout.n_content, torch.arange(layout.n_content, device=device)
        ledger = ItemLedger(row, "image", layout, n)
        return LMTokens(
            row, number, layout, ids, n, ledger, n_lm=n, start=start, slots=slots, separator_slots=separators
        )

    def _run(self, rows: Tensor, kept: Bool[Tensor, "b n"]) -> Tensor:
        """Run the steps; the rows with those that were made anew in their places."""
        runner = StepRunner(self.request.plan, lambda notes: add_notes(self.notes, notes), self.request.train)
        given = rows

        def tokens(group: list[LMTokens]) -> Tensor:
            return rows_of(group, rows)

        for number, step in self.request.plan.projected:
            for change in runner.run(number, step, self.items, tokens):
                item: LMTokens = change.item  # type: ignore[assignment]
                self._check_left(change)
                self.counts[item.row] -= item.leave(change.reduction, change.separators, kept)
                if change.rows is not None:
                    rows = rows.clone() if rows is given else rows
                    rows[item.row, item.slots] = change.rows.to(rows)
        return rows

    def _check_left(self, change: Change) -> None:
        if change.reduction.m == 0:
            raise UnsupportedError(
                f"{self.request.plan.plan} keeps no token of a picture, and words that read only this picture would "
                f"have nothing to attend to; keep at least one on {self.bound.info.model}."
            )

    def _as_kept(self, kept: Bool[Tensor, "b n"]) -> CrossKept:
        most = max(self.counts)
        index = kept.to(torch.uint8).argsort(dim=1, descending=True, stable=True)[:, :most]
        valid = None
        if min(self.counts) < most:
            valid = torch.arange(most, device=kept.device) < torch.tensor(self.counts, device=kept.device)[:, None]
        return CrossKept(self.request.attachment, index, valid)

    def leave(self, cache: Any) -> Ledger | None:
        """Tell the cache what it holds; the ledger of a prefill."""
        if self.kept is not None and cache is not None and kept_of(cache) is None:
            plain: Any = type(cache)
            cache.__class__ = _cross_class(plain)
            cache._winnow_cross = self.kept
        rows, length = self._words.shape[:2]
        if cache is not None and cache.get_seq_length() > length:
            return None
        mask = self.request.called.get("attention_mask")
        _, sizes, *_ = row_mask(mask if getattr(mask, "ndim", 0) == 2 else None, rows, length, self._words.device)
        cross = self.bound.family.cross_layers(self.bound.model)
        counts, given = tuple(self.counts) or (0,) * rows, (self.given,) * rows
        layers = tuple(counts if i in cross else sizes for i in range(len(self.bound.layers)))
        notes = self.notes if self.items else {"read_in_full": "no picture came with the request"}
        ledger = ledger_of(self.request, sizes, layers, notes)
        for item in self.items:
            item.record.ids = item.ids
        ledger.items = tuple(item.record for item in self.items)
        config = self.bound.lm.config
        ledger.flops, ledger.flops_full = (cross_flops(config, sizes, keys, cross) for keys in (counts, given))
        for i, layer in enumerate(getattr(cache, "layers", ())):
            if getattr(layer, "keys", None) is not None and layer.keys.numel():
                held = layer.keys.nbytes + layer.values.nbytes
                ledger.kv_bytes += held
                ledger.kv_bytes_full += held // layer.keys.shape[-2] * self.given if i in cross else held
        return ledger
