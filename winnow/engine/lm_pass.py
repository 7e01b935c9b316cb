"""The LM pass: one forward of the language model under a plan, be it a prefill, a later turn, or one decoded token.

What enters the LM is shortened where it enters; what a step drops deeper in is dropped before its layer. The model
makes masks and rotary embeddings itself wherever it is given the shortened tokens; only layers that hold fewer tokens
than the LM was entered with get their own. Where that would not be what the model was trained with (windows, masks that
are made outside), the LM is called with the whole sequence and every layer gets its part: see `WholeCall`.
"""

from collections.abc import Iterable
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor, nn

from winnow.cache.layer import HeldLayer
from winnow.core.errors import UnsupportedError
from winnow.core.ledger import ItemLedger, add_notes
from winnow.core.packing import Packing
from winnow.core.reduction import Reduction
from winnow.core.signal import Signal, Site
from winnow.engine.cache import CacheState, Past, check_cache, held_by, state_of, tag
from winnow.engine.cross_reads import CrossReading
from winnow.engine.devices import device_of
from winnow.engine.encoder import places
from winnow.engine.encoding import EncoderRecord
from winnow.engine.item_signals import item_signal
from winnow.engine.item_tokens import LMTokens, Merged, Span, carried, content_mask, content_slots, on_device, rows_of
from winnow.engine.packed import PackedSequence, check_segments, packed_segments, row_mask
from winnow.engine.probing import probe_layer
from winnow.engine.question import Questions
from winnow.engine.remember import remember_layers, remember_positions
from winnow.engine.request import Request, padding_mask
from winnow.engine.runner import Change, StepRunner
from winnow.engine.stretching import Stretches
from winnow.engine.whole_call import WholeCall
from winnow.signals.language import LMAttentionInputs, LMEntry, TextSpans, as_visible, question_slots
from winnow.signals.tap import AttendsItself, refuse_reading, scaling_of


class LMPass:
    """One forward of the language model.

    Args:
        request: to which it belongs.
        arguments: the keyword arguments of the language model.
        spans: where items stand, with their encoder records.
        questions, ends: per row, the span of the question and where the last item ends.
        ids: of the prompt's tokens, on the host, where they are known.
    """

    def __init__(
        self,
        request: Request,
        arguments: dict[str, Any],
        spans: Iterable[tuple[Span, EncoderRecord]] = (),
        questions: list[tuple[int, int]] | None = None,
        ends: list[int] | None = None,
        ids: Int[Tensor, "b s"] | None = None,
    ) -> None:
        self.request, self.bound, self.plan = request, request.bound, request.plan
        self.questions, self.ends, self.ids = questions or [], ends or [], ids
        embeds = arguments["inputs_embeds"]
        rows, length = embeds.shape[:2]
        self.cache = arguments.get(self.bound.cache_name)
        self.state: CacheState | None = state_of(self.cache)
        self.before = 0 if self.cache is None else self.cache.get_seq_length()
        given = padding_mask(request, arguments)
        mask, sizes, right, self._host_mask = row_mask(given, rows, length, embeds.device)
        # What the cache holds of layers that were never reduced is known from the caller's mask alone.
        self.caller_past = given[:, : self.before].to(mask.device).bool() if given is not None and self.before else None
        keeps_cache = arguments.get("use_cache")
        keeps_cache = self.bound.lm.config.use_cache if keeps_cache is None else keeps_cache
        alone = given is None and self.cache is None and not keeps_cache and self.bound.short
        segments = packed_segments(arguments.get("position_ids"), self.bound.lm.config) if alone else None
        check_segments(segments, self.plan)
        self.tokens = PackedSequence(
            Packing.of(mask, sizes, right),
            self.bound.lm,
            positions=arguments.get("position_ids"),
            before=self.before,
            compact=self.plan.plan.positions == "compact",
            segments=segments,
            has_cache=self.cache is not None or bool(keeps_cache),
        )
        self.notes: dict[str, Any] = {}
        self.packings: list[tuple[int, Packing]] = [(0, self.tokens.packing)]
        self.items = [self._item(span, record, mask) for span, record in spans]
        if self.items and self.plan.plan.methods:
            self.bound.family.check_prompt(self.bound.model, self.before + length)
        self.runner = StepRunner(self.plan, self.note, request.train, request.memory)
        self._lm_past: Past | None = None
        self.merged: list[Merged] = []
        self.stretches: Stretches | None = None
        self.reading = CrossReading.of(self)
        self.whole: WholeCall | None = None
        if not self.bound.short:
            self.whole = WholeCall(self.tokens, self.before, self.flash)
            self.held_before = tuple(held_by(self.cache, i) for i in self.bound.kv_of)
        elif self.state is not None:
            self.state.inside = True

    def note(self, notes: dict[str, Any]) -> None:
        """Take what a step recorded: counts add up."""
        add_notes(self.notes, notes)

    def _item(self, span: Span, record: EncoderRecord, mask: Tensor) -> LMTokens:
        layout = record.layouts[span.number]
        content = content_mask(layout)
        slots, separators = span.where[content].to(mask.device), span.where[~content].to(mask.device)
        ids = torch.arange(layout.n_content, device=mask.device)
        if self._host_mask is not None and not bool(self._host_mask[span.row, span.where].all()):
            # Tokens that the caller's mask hides are not there: they are no candidates, and nobody reads them.
            if record.reduced:
                raise UnsupportedError(
                    "the attention_mask hides tokens of a picture that was reduced at features; unmask them, or use a "
                    "method that acts at projected."
                )
            seen = mask[span.row, slots]
            slots, ids = slots[seen], ids[seen]
            separators = separators[mask[span.row, separators]]
        ledger = ItemLedger(span.row, record.modality, layout, layout.n_content)
        item = LMTokens(
            span.row, span.number, layout, ids, layout.n_content, ledger,
            start=int(span.where[0]), slots=slots, separator_slots=separators,
        )  # fmt: skip
        if record.items:
            tower = record.items[span.number]
            item.states = {number: on_device(state, mask.device) for number, state in tower.states.items()}
            if item.count < layout.n_content and not record.reduced:
                # What was remembered of hidden tokens goes with them.
                left = Reduction.select(ids, layout.n_content)
                item.states = {number: carried(state, left) for number, state in item.states.items()}
            ledger.reductions += tower.record.reductions
        item.encoded = record
        return item

    def enter(self, arguments: dict[str, Any]) -> dict[str, Any] | None:
        """Before the LM: place reduced features, run steps at `projected`; None: the LM goes on as it was called."""
        hidden = arguments["inputs_embeds"]
        if self.whole is not None:
            self.tokens.enter_lm()
        hidden = self._place_features(hidden)
        self._load_signals()
        self._read_questions(arguments["inputs_embeds"], hidden)
        with self.request.clock.phase("select"):
            for number, step in self.plan.projected if self.items else ():
                hidden = self._run(number, step, hidden)
        for item in self.items:
            item.n_lm = item.count
        tokens = self.tokens
        if self.whole is not None:
            self.packings[0] = (0, tokens.packing)
            if not self.merged:
                return None
            return {**arguments, "inputs_embeds": self.whole.embeds(arguments["inputs_embeds"], hidden)}
        tokens.enter_lm()
        self.packings[0] = (0, tokens.packing)
        past = self._lm_past = None if self.state is None else self.state.layers.get(0)
        if not tokens.touched and past is None:
            return None
        held = self.held(0)
        mask = tokens.lm_mask(hidden, self.past_mask(past), held)
        return {
            **arguments,
            "inputs_embeds": hidden,
            "attention_mask": mask,
            "position_ids": tokens.position_ids(past),
        }

    @property
    def flash(self) -> bool:
        return "flash" in (self.bound.lm.config._attn_implementation or "")

    @property
    def sdpa(self) -> bool:
        """Whether a lone token is given no mask; other implementations make one for the length that layer 0 holds."""
        return self.bound.lm.config._attn_implementation == "sdpa"

    def first_layer(self, arguments: dict[str, Any]) -> int | None:
        """The first layer that must be told something before it runs; None where all go on as the LM is called.

        Args:
            arguments: with which the LM is called.
        """
        if self.whole is not None:
            return self._first_of_whole(arguments)
        if self.flash:
            return 0 if self.tokens.touched or self.state is not None else self.plan.first_layer
        first = [self.plan.first_layer] if self.items and self.plan.first_layer is not None else []
        state = self.state
        if state is not None and state.first_other is not None:
            quiet = self.sdpa and not state.padded and self._nothing_to_mask(self._lm_past, arguments)
            if not quiet:
                first.append(state.first_other)
        return min(first, default=None)

    def _first_of_whole(self, arguments: dict[str, Any]) -> int | None:
        if self.tokens.touched:
            return 0
        first = [self.plan.first_layer] if self.items and self.plan.first_layer is not None else []
        if self.state is not None and self.bound.windowed:
            return 0
        if self.state is not None and self.state.layers:
            given = arguments.get("attention_mask")
            masks = given.values() if isinstance(given, dict) else (given,)
            one = self.tokens.packing.width == 1 and self.sdpa
            quiet = one and not self.state.padded and all(mask is None for mask in masks)
            first += [] if quiet else [min(self.state.layers)]
        return min(first, default=None)

    def layer(
        self, index: int, args: tuple[Any, ...], arguments: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        """Before LM layer `index`: run its steps, then give it what belongs to its slots; None: nothing to change.

        Args:
            args: its positional arguments, the hidden states first.
        """
        if self.cache is None:
            self.cache = arguments.get(self.bound.cache_name)  # the LM makes one where the caller gave none
        tokens, hidden = self.tokens, args[0]
        if self.whole is not None and index == 0:
            hidden = self.whole.hidden(hidden)
        steps = self.plan.layers.get(index, ()) if self.items else ()
        if steps:
            with self.request.clock.phase("select"):
                for number, step in steps:
                    self._probe(index, step, (hidden, *args[1:]), arguments)
                    hidden = self._run(number, step, hidden)
            self.packings.append((index, tokens.packing))
        past = self.past(index)
        if self.whole is not None:
            forgets = self.state is not None and self.held_before[index] < self.before
            if not tokens.touched and past is None and not forgets:
                return None
            rest, changed = self._whole_arguments(index, args[1:], arguments)
            return (hidden, *rest), changed
        if tokens.packing is tokens.at_lm and past is self._lm_past:
            if not self.flash or not (tokens.touched or past is not None):
                return None
            return (hidden, *args[1:]), {**arguments, "position_ids": None}
        if self._nothing_to_mask(past, arguments):
            return None
        changed = {
            **arguments,
            "position_embeddings": tokens.embeddings(arguments["position_embeddings"], hidden, past),
            "attention_mask": tokens.layer_mask(index, hidden, self.past_mask(past), self.held(index)),
            # Flash attention would read gapped positions as packed samples; nothing else needs them here.
            "position_ids": None,
        }
        return (hidden, *args[1:]), changed

    def _whole_arguments(
        self, index: int, args: tuple[Any, ...], arguments: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        past = self.past(index)
        held, linear = self.held_before[index], self.bound.is_linear(index)
        return self.whole.layer(self.bound.layers[index], args, arguments, past, held, linear)  # type: ignore[union-attr]

    def _nothing_to_mask(self, past: Past | None, arguments: dict[str, Any]) -> bool:
        """A decoded token reads all that its layer holds, whatever that is: no mask, and its own position."""
        plain = self.tokens.packing is self.tokens.at_lm and self.tokens.packing.width == 1 and not self.tokens.compact
        return plain and arguments.get("attention_mask") is None and self.past_mask(past) is None

    def attention(self, layer: int, module: nn.Module, q: Tensor, k: Tensor, mask: Any = None) -> None:
        """A tapped LM layer shows its queries, keys and mask; by now its cache holds the keys of this forward too."""
        if self.reading is not None and (layer, "heads") in self.request.attachment.reads:
            self.reading.queries[layer] = q
        wanted = self.plan.listeners.get(Site("lm", layer), ())
        if self.items and wanted:
            if isinstance(k, AttendsItself) or (self.whole is not None and self._cut(layer) is not None):
                refuse_reading(self.plan.plan)
            with self.request.clock.phase("select"):
                self._read(wanted, self._inputs(layer, module, q, k, mask))

    def hidden(self, layer: int, seen: Any) -> None:
        """What an LM layer took in and gave."""
        wanted = self.plan.listeners.get(Site("lm", layer, "hidden"), ())
        if self.items and wanted:
            with self.request.clock.phase("select"):
                self._read(wanted, seen)

    def _read(self, wanted: Iterable[Signal], seen: Any) -> None:
        """Values of each slot, or of each row, become values of items."""
        with torch.no_grad():
            for signal in wanted:
                values = signal.read(seen).to(self.tokens.packing.mask.device)
                for item in self.items:
                    own = values[item.row]
                    item.signals[signal] = own[item.slots] if signal.per == "token" else own

    def spans(self, device: torch.device) -> TextSpans:
        """Which tokens of each row are what, at this moment."""
        rows = len(self.tokens.packing.sizes)
        return TextSpans(self.questions, self.ends, content_slots(self.items, rows, device))

    def _cut(self, layer: int) -> Any:
        """The cache of a layer, if a plan has taken slots from it."""
        held = None if self.cache is None or layer >= len(self.cache.layers) else self.cache.layers[layer]
        return held if isinstance(held, HeldLayer) and held.changed else None

    def _inputs(self, layer: int, module: nn.Module, q: Tensor, k: Tensor, mask: Any = None) -> LMAttentionInputs:
        cut = self._cut(layer)
        past = self.past_mask(self.past(layer)) if cut is None else cut.store.real
        spans = self.spans(q.device)
        packing, past = self.tokens.packing.to(q.device), None if past is None else past.to(q.device)
        seen = None if self.whole is None else as_visible(mask)
        seen = None if seen is None else seen.to(q.device).expand(q.shape[0], -1, -1, -1)
        return LMAttentionInputs(q, k, scaling_of(module, q), packing, past, spans, seen)

    def _probe(self, index: int, step: Any, args: tuple[Any, ...], arguments: dict[str, Any]) -> None:
        """What a step wants of the layer that is about to run."""
        wanted = [s for s in step.needs if s in self.plan.probed.get(index, ())]
        if not wanted or not any(item.count for item in self.items):
            return
        entering = [s for s in wanted if s.site(self.bound.info).shows == "entry"]
        if entering:
            packing = self.tokens.packing.to(args[0].device)
            self._read(entering, LMEntry(args[0], packing, self.spans(args[0].device)))
        wanted = [s for s in wanted if s not in entering]
        if not wanted:
            return
        past = self.past(index)
        layer, hidden, mask = self.bound.layers[index], args[0], None
        with torch.no_grad():
            rows = self._rows_of({s.queries for s in wanted})
            device = device_of(layer)  # where it is called, and so where its parts can be
            hidden, rows = hidden.to(device), None if rows is None else rows.to(device)
            if self.whole is not None:
                rest, inputs = self._whole_arguments(index, args[1:], arguments)
                mask = inputs.get("attention_mask")
            else:
                embeddings = self.tokens.embeddings(arguments["position_embeddings"], hidden, past)
                embeddings = tuple(x.to(device) for x in embeddings)
                rest, inputs = args[1:], {**arguments, "position_embeddings": embeddings, "position_ids": None}
            attention = self.bound.attention_of(index)
            q, k = probe_layer(layer, attention, (hidden, *rest), inputs, self.cache, rows)
            self._read(wanted, self._inputs(index, attention, q, k, mask))

    def _rows_of(self, queries: set[str]) -> Tensor | None:
        """Slots `[B, r]` of the tokens whose queries are wanted; None: all. Of a sample with fewer the last repeats."""
        if "all" in queries:
            return None
        packing = self.tokens.packing
        last = packing.last_slots()[:, None]
        if queries == {"last"}:
            return last
        asked = question_slots(packing, self.questions)
        rows = last.repeat(1, 1 + max(map(len, asked)))
        for b, slots in enumerate(asked):
            rows[b, : len(slots)] = slots
        return rows

    def past(self, index: int) -> Past | None:
        """What the cache holds for a layer, if it is not what the caller gave."""
        return None if self.state is None else self.state.layers.get(self.bound.kv_of[index])

    def held(self, index: int) -> int:
        """Slots that the cache of a layer holds before this forward."""
        if self.cache is None or index >= len(self.cache.layers):
            return 0
        return self.cache.layers[index].get_seq_length()

    def past_mask(self, past: Past | None) -> Tensor | None:
        return self.caller_past if past is None else past.mask

    def _load_signals(self) -> None:
        """What steps of the LM's side want of the encoder."""
        if not self.items:
            return
        steps = [*self.plan.projected, *(pair for own in self.plan.layers.values() for pair in own)]
        stacks = ("lm", "text")
        wanted = {(n, s) for n, step in steps for s in step.needs if s.site(self.bound.info).stack not in stacks}
        for number, signal in wanted:
            for item in self.items:
                if signal in item.signals or not self.plan.acts_on(number, item.record.modality):
                    continue
                item.signals[signal] = item_signal(self.bound, item, self.items, lambda own: own.encoded, signal)

    def _read_questions(self, given: Tensor, hidden: Tensor) -> None:
        """Signals of the questions, from what the language model is given.

        Args:
            given: `[B, S, D]` the whole prompt.
            hidden: `[B, P, D]` the rows that are left of it.
        """
        if not self.items or not self.plan.text_signals:
            return
        with self.request.clock.phase("select"), torch.no_grad():
            embeds = lambda row, at: given[row, at.to(given.device)]  # noqa: E731
            own = Questions(self.request.reader, self.ids, self.questions, embeds, self.plan.text_encoder)
            for item in self.items:
                rows = hidden[item.row, item.slots.to(hidden.device)].to(item.slots.device)
                for signal in self.plan.text_signals:
                    item.signals[signal] = own.read(signal, item.row, rows)

    def _run(self, number: int, step: Any, hidden: Tensor) -> Tensor:
        if hidden.ndim != 3:
            raise UnsupportedError(
                f"{self.plan.plan.methods[number].slug} acts at {step.at}, where {self.bound.info.model} carries "
                f"{hidden.ndim - 2} rows for each token; use a method that acts at projected."
            )

        changes = self.runner.run(number, step, self.items, lambda group: rows_of(group, hidden))
        return self._apply(hidden, changes) if changes else hidden

    def _apply(self, hidden: Tensor, changes: list[Change]) -> Tensor:
        """Put new rows in the slots of their representatives, or in the item's first slots, and drop the others."""
        kept = self.tokens.packing.mask.clone()
        sizes = list(self.tokens.packing.sizes)
        source = hidden
        for change in changes:
            item: LMTokens = change.item  # type: ignore[assignment]
            was, reduction = item.slots, change.reduction
            sizes[item.row] -= item.leave(reduction, change.separators, kept)
            at = item.slots
            if change.rows is not None:
                places = self.tokens.packing.source[item.row]
                self.merged.append(Merged(item.row, places[was], places[at], reduction))
                source = source.clone() if source is hidden else source
                source[item.row, at.to(source.device)] = change.rows.to(source)
                self.tokens.place(item.row, at, was[reduction.representatives])
        return self._repack(source, kept, tuple(sizes))

    def _repack(self, hidden: Tensor, kept: Tensor, sizes: tuple[int, ...]) -> Tensor:
        if self.cache is not None and not self.tokens.touched:
            self._tag()
        hidden, arrivals = self.tokens.select(hidden, kept, sizes)
        for item in self.items:
            item.slots = arrivals[item.row, item.slots]
            item.separator_slots = arrivals[item.row, item.separator_slots]
        return hidden

    def _tag(self) -> None:
        check_cache(self.cache, self.bound.windowed)  # type: ignore[arg-type]
        self.state = tag(self.cache, self.request.attachment, self.before)  # type: ignore[arg-type]
        self.state.inside = self.bound.short

    def _place_features(self, hidden: Tensor) -> Tensor:
        """Rows that steps at `features` made stand in their places already; what stands between them is dropped."""
        reduced = [item for item in self.items if item.encoded.reduced]
        if not reduced:
            return hidden
        kept, sizes = self.tokens.packing.mask.clone(), list(self.tokens.packing.sizes)
        for item in reduced:
            record = item.encoded
            tower = record.items[item.number]
            ids = tower.ids.to(item.slots.device)
            at = item.slots[places(tower).to(item.slots.device)]
            self.tokens.place(item.row, at, item.slots[ids])
            kept[item.row, item.slots] = False
            kept[item.row, at] = True
            sizes[item.row] -= item.slots.shape[0] - ids.shape[0]
            if not tower.separators or not ids.shape[0]:
                sizes[item.row] -= item.drop_separators(kept)
            item.slots, item.ids = at, ids
        for record in {id(item.encoded): item.encoded for item in reduced}.values():
            self.note(record.notes)
        return self._repack(hidden, kept, tuple(sizes))

    def leave(self, last: Tensor, cache: Any) -> Tensor:
        """After the LM: outputs get their logical length back; the cache learns how long it is."""
        self.cache = cache if self.cache is None else self.cache  # made by the LM, and returned with its output
        if (self.tokens.touched or self.stretches or self.reading) and self.state is None and self.cache is not None:
            self._tag()
        state = self.state
        if state is not None:
            state.inside = False
            state.logical, state.stretches = self.before + self.tokens.initial.logical, self.stretches
            if self.items:
                state.prompt = self.before + max(self.ends)
            remember_layers(self, state)
            if self.bound.info.mrope:
                remember_positions(self, state)
        if self.reading is not None:
            self.reading.leave(state)
        return self.tokens.to_logical(last, self.tokens.packing) if self.tokens.touched else last

    def close(self) -> None:
        """Also after an exception: the cache tells its logical length again."""
        if self.state is not None:
            self.state.inside = False

    def packing_at(self, layer: int) -> Packing:
        """The packing with which an LM layer ran."""
        return next(packing for first, packing in reversed(self.packings) if first <= layer)

    def logical_states(self, states: tuple[Tensor | None, ...]) -> tuple[Tensor | None, ...]:
        """Recorded hidden states at their logical length; those that were not asked for are None.

        There is one for each layer, its output, or one more, the input of the first layer, before them.
        """
        first = len(states) - len(self.bound.layers)
        packings = [self.packing_at(max(0, i - first)) for i in range(len(states))]
        return tuple(h if h is None else self.tokens.to_logical(h, p) for h, p in zip(states, packings, strict=True))
