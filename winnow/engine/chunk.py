"""Chunk: one forward of the language model under a plan, be it a prefill, a later turn, or one decoded token.

Outside, everything is counted in logical positions. Inside, each layer sees the slots that are left. The chunk holds
the packing of the moment, runs the steps before each layer, and hands the layer what belongs to its slots.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from transformers.masking_utils import create_causal_mask

from winnow.core.packing import Packing
from winnow.core.reduction import Reduction
from winnow.core.signal import LMAttention, LMAttentionMass, Signal
from winnow.core.step import Reduce, State
from winnow.core.view import View
from winnow.engine import steps as stepping
from winnow.engine.cache import CacheState, Past, Physical, check_layers, state_of, tag
from winnow.engine.compiled import Compiled
from winnow.engine.encode import vision_signal
from winnow.engine.items import Item
from winnow.engine.listen import Listener
from winnow.engine.probing import probe_layer
from winnow.signals.tap import scaling_of

if TYPE_CHECKING:
    from winnow.engine.attach import Engine

Outcome = tuple[list[Item], Reduce, View, list[Reduction]]  # a group, what it asked for, of what, and of each item


class Chunk:
    """See the module.

    Args:
        packing: of the chunk as the caller gave it.
        past_mask: `[B, L]` real slots of a cache that was never reduced, if it pads.
        items: what can be reduced in this chunk; none while decoding.
        questions, ends: per row, the question's span and where the last item ends.
        positions: `[B or 1, S]` logical positions, needed when they are recomputed (`compact`).
    """

    def __init__(
        self,
        engine: Engine,
        compiled: Compiled,
        packing: Packing,
        cache: Any,
        *,
        past_mask: Tensor | None = None,
        items: list[Item] | None = None,
        questions: list[tuple[int, int]] | None = None,
        ends: list[int] | None = None,
    ) -> None:
        self.engine, self.compiled, self.packing, self.cache = engine, compiled, packing, cache
        self.initial = packing
        self.items = items or []
        self.questions, self.ends = questions or [], ends or []
        self.past_mask = past_mask
        self.state: CacheState | None = state_of(cache)
        self.before = 0 if cache is None else cache.get_seq_length()
        self.position_of = packing.source
        self.positions: Tensor | None = None
        self.touched = False
        self.heard: dict[Signal, Tensor] = {}
        self.layer_packings: dict[int, Packing] = {}
        self.notes: dict[str, Any] = {}
        self._memo: dict[Any, Any] = {}

    @property
    def compact(self) -> bool:
        return self.compiled.plan.positions == "compact"

    def layer(self, index: int, hidden: Tensor, kwargs: dict[str, Any]) -> Tensor:
        """Before LM layer `index`: run its steps, then set what the layer needs for the slots that are left."""
        if self.cache is None:
            self.cache = kwargs.get("past_key_values")  # the LM makes one where the caller gave none
        if self.items and index == 0:
            hidden = self._place_feature_rows(hidden)
        if self.items and index in self.compiled.layers:
            with self.engine.clock.phase("select"):
                for number, step in self.compiled.layers[index]:
                    hidden = self._run(number, step, index, hidden, kwargs)
        self.layer_packings[index] = self.packing
        past = self.state.layers.get(index) if self.state is not None else None
        if self.touched or past is not None:
            self._rewire(index, hidden, kwargs, past)
        return hidden

    def hear(self, index: int, module: nn.Module, q: Tensor, k: Tensor) -> None:
        """A tapped LM layer shows its queries and keys."""
        wanted = self.compiled.lm.get(index, ())
        if not self.items or not wanted:
            return
        with torch.no_grad(), self.engine.clock.phase("select"):
            # By now the layer's cache holds the keys of this chunk too.
            listener = self._listener(index, k.shape[2] - q.shape[2])
            for signal in wanted:
                self.heard[signal] = listener.read(signal, q, k, scaling_of(module, q))

    def _listener(self, index: int, held: int) -> Listener:
        past = self._past_of(index)
        content = []
        for row in range(len(self.packing.sizes)):
            own = [item.slots for item in self.items if item.row == row and item.count]
            content.append(torch.cat(own) if own else self.packing.source.new_zeros(0))
        mask = past.mask if past is not None else self.past_mask
        return Listener(self.packing, mask, held, self.questions, content, self.ends)

    def _held(self, index: int) -> int:
        """Slots that the cache of a layer holds before this chunk."""
        if self.cache is None or index >= len(self.cache.layers):
            return 0
        return self.cache.layers[index].get_seq_length()

    def _past_of(self, index: int) -> Past | None:
        return None if self.state is None else self.state.layers.get(index)

    def _run(self, number: int, step: Any, index: int, hidden: Tensor, kwargs: dict[str, Any]) -> Tensor:
        slug = self.compiled.plan.methods[number].slug
        if step.at.name == "layers":
            for item in self.items:
                item.entered = item.count if item.entered is None else item.entered
        probed = self._probed(step, index, hidden, kwargs)
        outcomes: list[Outcome] = []
        streaming = self.compiled.plan.methods[number].streaming
        for group in stepping.groups([item for item in self.items if item.count], number, streaming):
            view = self._view(group, number, step, hidden, probed)
            state = stepping.joined([item.states.get(number, State()) for item in group])
            with torch.no_grad():
                action, after = stepping.act(step, slug, view, state, self._note)
            for item, own in zip(group, stepping.split(after, len(group)), strict=True):
                item.states[number] = own
            if action is not None:
                lanes = [action.reduction.lane(i) for i in range(len(group))]
                outcomes.append((group, action, view, lanes))
                for item, one in zip(group, lanes, strict=True):
                    item.record.reductions.append((str(step.at), slug, one))
        return self._reduce(hidden, outcomes) if outcomes else hidden

    def _probed(self, step: Any, index: int, hidden: Tensor, kwargs: dict[str, Any]) -> dict[Signal, Tensor]:
        wanted = [s for s in step.needs if isinstance(s, LMAttention) and s.layer == index]
        if not wanted or not any(item.count for item in self.items):
            return {}
        with torch.no_grad():
            listener = self._listener(index, self._held(index))
            embeddings = self._embeddings(hidden, kwargs["position_embeddings"], self._past_of(index))
            layer = self.engine.lm.layers[index]
            rows = None if any(s.rows != "last" for s in wanted) else listener.last_slots()
            q, k = probe_layer(layer, hidden, embeddings, self.cache, rows)
            return {s: listener.read(s, q, k, scaling_of(layer.self_attn, q)) for s in wanted}

    def _view(self, group: list[Item], number: int, step: Any, hidden: Tensor, probed: dict[Signal, Tensor]) -> View:
        rows = torch.tensor([item.row for item in group], device=hidden.device)
        slots = torch.stack([item.slots for item in group])
        ids = torch.stack([item.ids for item in group])
        signals: dict[Signal, Tensor] = {}
        for signal in step.needs:
            if isinstance(signal, LMAttentionMass):
                signals[signal] = self.heard[signal][rows]
            elif isinstance(signal, LMAttention):
                signals[signal] = (probed.get(signal, self.heard.get(signal)))[rows[:, None], slots]  # type: ignore[index]
            else:
                signals[signal] = torch.stack([vision_signal(self.engine, item, signal)[item.ids] for item in group])
        first = group[0]
        return View(
            hidden[rows[:, None], slots],
            first.layout,
            ids,
            first.record.entry,
            signals,
            seed=self.compiled.plan.seed,
            module=self.compiled.modules[number],
            entered=-1 if first.entered is None else first.entered,
        )

    def _note(self, notes: dict[str, Any]) -> None:
        for name, value in notes.items():
            known = self.notes.get(name)
            adds = known is not None and isinstance(value, int | Tensor) and not isinstance(value, bool)
            self.notes[name] = known + value if adds else value

    def _reduce(self, hidden: Tensor, outcomes: list[Outcome]) -> Tensor:
        """Apply what the groups asked for, then pack the rows anew."""
        kept = self.packing.mask.clone()
        sizes = list(self.packing.sizes)
        source, copied = hidden, False
        moved: list[tuple[Item, Tensor, Tensor]] = []
        for group, action, view, lanes in outcomes:
            reduction = action.reduction
            rows = None if reduction.is_selection and reduction.ordered else reduction.apply(view.tokens)
            anchors = reduction.anchors
            for i, item in enumerate(group):
                m = reduction.m if reduction.counts is None else reduction.counts[i]
                own = anchors[i, :m]
                unique = reduction.is_selection or reduction.anchor is not None
                places = item.slots[own].sort().values if unique else item.slots[:m]
                kept[item.row, item.slots] = False
                kept[item.row, places] = True
                sizes[item.row] -= item.count - m
                if action.separators == "drop" or m == 0:
                    sizes[item.row] -= self._drop_separators(item, kept)
                if rows is not None:
                    if not copied:
                        source, copied = hidden.clone(), True
                        self.position_of = self.position_of.clone()
                    where = self.position_of[item.row, item.slots[own]]
                    source[item.row, places] = rows[i, :m].to(source.dtype)
                    self.position_of[item.row, places] = where
                moved.append((item, places, item.ids[own]))
                item.states = {k: stepping.carried(s, lanes[i]) for k, s in item.states.items()}
        for item, places, ids in moved:
            item.slots, item.ids = places, ids
        return self._repack(source, kept, tuple(sizes))

    @staticmethod
    def _drop_separators(item: Item, kept: Tensor) -> int:
        """Remove an item's separators from `kept`; how many they were."""
        count = item.separators.shape[0]
        kept[item.row, item.separators] = False
        item.separators = item.separators[:0]
        return count

    def _repack(self, hidden: Tensor, kept: Tensor, sizes: tuple[int, ...]) -> Tensor:
        if not self.touched:
            self._first_touch()
        old = self.packing
        self.packing, slots = old.keep(kept, sizes)
        arrivals = old.arrivals(slots)
        self.position_of = self.position_of.gather(1, slots)
        self.heard = {s: h if h.ndim == 1 else h.gather(1, slots) for s, h in self.heard.items()}
        for item in self.items:
            item.slots = arrivals[item.row, item.slots]
            item.separators = arrivals[item.row, item.separators]
        return hidden.gather(1, slots[..., None].expand(-1, -1, hidden.shape[-1]))

    def _first_touch(self) -> None:
        self.touched = True
        if self.cache is not None:
            check_layers(self.cache)
            self.state = tag(self.cache, self.engine, self.before)

    def _place_feature_rows(self, hidden: Tensor) -> Tensor:
        """Put the rows that a step at `features` made where the item's tokens stood."""
        merged = [item for item in self.items if item.encoding.rows is not None]
        if not merged:
            return hidden
        kept, sizes = self.packing.mask.clone(), list(self.packing.sizes)
        hidden, self.position_of = hidden.clone(), self.position_of.clone()
        for item in merged:
            made = item.encoding.rows[item.number]  # type: ignore[index]
            ids = made.ids.to(item.slots.device)
            m = ids.shape[0]
            anchor_slots = item.slots[ids]
            places = anchor_slots if made.in_place else item.slots[:m]
            where = self.position_of[item.row, anchor_slots]
            kept[item.row, item.slots] = False
            kept[item.row, places] = True
            sizes[item.row] -= item.count - m
            if item.encoding.separators == "drop":
                sizes[item.row] -= self._drop_separators(item, kept)
            hidden[item.row, places] = made.tokens.to(hidden)
            self.position_of[item.row, places] = where
            item.slots, item.ids = places, ids
            item.record.reductions += made.record
            self._note(item.encoding.notes)
        return self._repack(hidden, kept, tuple(sizes))

    def _once(self, key: Any, make: Callable[[], Any]) -> Any:
        """One computation for all layers that share the same slots."""
        if key not in self._memo:
            self._memo[key] = make()
        return self._memo[key]

    def _rewire(self, index: int, hidden: Tensor, kwargs: dict[str, Any], past: Past | None) -> None:
        """Position embeddings, mask and positions for the slots of this layer; and what its cache will hold."""
        kwargs["position_embeddings"] = self._embeddings(hidden, kwargs["position_embeddings"], past)
        held = self._held(index)
        mask = self._once(("mask", self.packing, past, held), lambda: self._mask2d(past, held))
        kwargs["attention_mask"] = self._once(
            ("causal", self.packing, past, held),
            lambda: create_causal_mask(
                config=self.engine.lm.config,
                inputs_embeds=hidden,
                attention_mask=mask,
                past_key_values=Physical(held) if held else None,  # type: ignore[arg-type]
                layer_idx=index if held else None,
            ),
        )
        # Gapped positions without a mask would be read as packed sequences; nothing else needs them here.
        kwargs["position_ids"] = None
        if self.state is not None:
            self.state.layers[index] = self._once(
                ("past", self.packing, past, held), lambda: Past(mask, self._offset(past))
            )

    def _mask2d(self, past: Past | None, held: int) -> Tensor | None:
        """`[B, held + P]` real slots; None when nothing pads, so that fused causal attention stays on."""
        before = past.mask if past is not None else self.past_mask if held else None
        if before is None and not self.packing.padded:
            return None
        if held and before is None:
            before = torch.ones(len(self.packing.sizes), held, dtype=torch.bool, device=self.packing.mask.device)
        return self.packing.mask if before is None else torch.cat([before.bool(), self.packing.mask], 1)

    def _offset(self, past: Past | None) -> Tensor:
        rows = len(self.packing.sizes)
        old = torch.zeros(rows, dtype=torch.int64) if past is None else past.offset
        if not self.compact:
            return old
        dropped = torch.tensor([full - left for full, left in zip(self.initial.sizes, self.packing.sizes, strict=True)])
        return old + dropped.to(old.device)

    def _embeddings(self, hidden: Tensor, embeddings: tuple[Tensor, Tensor], past: Past | None) -> tuple[Tensor, ...]:
        """The layer's cos and sin for the slots that are left."""
        if not self.touched and (past is None or not self.compact):
            return embeddings
        if self.compact:
            return self._once(("compact", self.packing, past), lambda: self._compact_embeddings(hidden, past))
        rows = self.packing.source.shape[0]

        def gather() -> tuple[Tensor, ...]:
            index = self.position_of[..., None]
            return tuple(
                e.expand(rows, -1, -1).gather(1, index.to(e.device).expand(-1, -1, e.shape[-1])) for e in embeddings
            )

        return self._once(("embeddings", self.packing, id(embeddings[0])), gather)

    def _compact_embeddings(self, hidden: Tensor, past: Past | None) -> tuple[Tensor, Tensor]:
        """Positions renumbered without gaps, from where the layer's cache ends."""
        given = self.positions.expand(len(self.packing.sizes), -1)  # type: ignore[union-attr]
        mask = self.packing.mask
        first = given.gather(1, self.initial.mask.to(torch.uint8).argmax(1)[:, None])
        ranks = (mask.cumsum(1) - 1).clamp_min(0)
        offset = torch.zeros_like(first) if past is None else past.offset.to(first.device)[:, None]
        return self.engine.lm.rotary_emb(hidden, position_ids=first - offset + ranks)

    def finish(self, last: Tensor) -> Tensor:
        """After the LM: outputs get their logical length back; the cache learns how long it is."""
        state = self.state
        if state is not None:
            state.logical = self.before + self.packing.logical
            if self.items:
                state.prompt = self.before + max(self.ends)
            if self.engine.info.mrope:
                self._remember_positions(state)
        return self.logical(last, self.packing)

    def _remember_positions(self, state: CacheState) -> None:
        """With 3-D positions: how many real tokens each row has, and how far its positions run ahead of them."""
        real = self.initial.mask.sum(1)
        state.real = real if state.real is None else state.real + real
        if self.items:
            axes = self.positions[-3:]  # type: ignore[index]
            last = axes.masked_fill(~self.initial.mask, 0).amax((0, 2))
            state.rope_deltas = (last + 1 - state.real)[:, None]

    def logical(self, x: Tensor, packing: Packing) -> Tensor:
        """`[B, P, D]` → `[B, S, D]`; a dropped position repeats the survivor before it."""
        if not self.touched or packing is self.initial:
            return x
        index = self._once(("logical", packing), packing.to_logical)
        return x.gather(1, index.to(x.device)[..., None].expand(-1, -1, x.shape[-1]))
