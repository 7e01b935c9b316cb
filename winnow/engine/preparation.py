"""Preparation: a plan made ready to shorten the inputs of one model.

The second, independent path. Pictures are encoded and chosen from as under `compress`, by the same runner of steps, but
on a twin of the model; what the language model reads is assembled here, and read by the model's own code.
"""

import functools
import inspect
from collections.abc import Mapping
from typing import Any

import torch
from jaxtyping import Bool, Int
from torch import Tensor
from transformers.generation import utils as generation

from winnow.core.errors import UnsupportedError, WinnowError
from winnow.core.ledger import Ledger, add_notes
from winnow.core.method import Method
from winnow.core.packing import Packing
from winnow.core.plan import Plan
from winnow.engine.bound_model import LINEAR, WINDOWED
from winnow.engine.bound_plan import BoundPlan
from winnow.engine.clock import Clock
from winnow.engine.compress import chosen_plan
from winnow.engine.encoded_item import EncodedItem, run_projected
from winnow.engine.encoding import record_of, unmarked
from winnow.engine.engine import Engine, is_compressed
from winnow.engine.features import by_item, deep_layers, other_fields, shortened_features
from winnow.engine.forward import joined_items, questions_of
from winnow.engine.handle import Handle
from winnow.engine.item_tokens import find_spans
from winnow.engine.ledgers import ledger_of, why_in_full
from winnow.engine.prepared import AS_LONG, PER_TOKEN, Bucket, Prepared, bucketed, widened
from winnow.engine.question import Questions
from winnow.engine.request import Request
from winnow.engine.runner import StepRunner
from winnow.engine.spans import template_suffix
from winnow.engine.stretching import stretching
from winnow.engine.twin import twin
from winnow.engine.video_items import of_videos
from winnow.models.families import family_of, unwrap

REFUSED = {
    "inputs_embeds": "pictures in embeddings cannot be told from text; pass input_ids",
    "mm_encoder_outputs": "what was encoded before is not known to the plan; pass the pixels",
    "past_key_values": "a cache that holds tokens already cannot be shortened; pass the whole conversation",
    "cache": "a cache that holds tokens already cannot be shortened; pass the whole conversation",
}
OUTPUTS = ("image", "video")  # what generate encodes ahead


class Preparation:
    """A plan made ready to shorten inputs for a model.

    It holds a twin of the model, which shares its weights as they are now.

    Args:
        model, plan, keep, positions, weights, processor, text_encoder: as in `prepare`.
    """

    def __init__(
        self,
        model: Any,
        plan: str | Plan | Method | None = None,
        *,
        keep: int | float | str | None = None,
        positions: str | None = None,
        weights: Any = None,
        processor: Any = None,
        text_encoder: Any = None,
    ) -> None:
        inner: Any = unwrap(model)
        family = family_of(inner)
        if is_compressed(inner):
            raise WinnowError(
                "this model is compressed, and would not read prepared inputs as they are: call detach() on its handle "
                "first, or go on with model.generate(**inputs)."
            )
        _check_class(inner)
        self.model = twin(inner)
        suffix = None if processor is None else template_suffix(processor)
        given = {"processor": processor, "text_encoder": text_encoder}
        self.engine = Engine(self.model, family, chosen_plan(plan, keep, positions), suffix, **given)
        self.bound, self.plan = self.engine.bound, self.engine.default
        _check_plan(self.plan)
        if weights is not None:
            Handle(self.engine).load(weights)
        self.engine.attach()
        pads = (getattr(x, "pad_token_id", None) for x in (self.model.generation_config, self.bound.lm.config))
        self.pad = next((value for value in pads if isinstance(value, int)), 0)

    @torch.no_grad()
    def of(self, inputs: Mapping[str, Any], *, bucket: Bucket = None, use_cache: bool = True) -> Prepared:
        """The shortened inputs; see `prepare`."""
        given = {name: value for name, value in inputs.items() if value is not None}
        ids, mask = self._checked(given)
        host = mask.bool().cpu()
        sizes = tuple(host.sum(1).tolist())
        self._check_layers(max(sizes))
        positions = self._positions(given, ids, mask)
        outputs, consumed = self._encode(given)
        records = {m: record for m, output in outputs.items() if (record := record_of(output)) is not None}
        items = self._items(ids, host, records, outputs)
        if items and self.plan.plan.methods:
            self.bound.family.check_prompt(self.model, max(sizes))
        notes: dict[str, Any] = {}
        for record in records.values():
            add_notes(notes, record.notes)
        runner = StepRunner(self.plan, functools.partial(add_notes, notes))
        run_projected(runner, self.bound, items, records, self._questions(given, ids, items))

        made = {name: value for name, value in given.items() if name not in consumed}
        made |= {"input_ids": ids, "attention_mask": mask, "position_ids": positions}
        outputs = {modality: unmarked(output) for modality, output in outputs.items()}
        real = sizes
        touched = any(item.changed for item in items)
        if touched:
            self._check_ends(host, items)
            packing, position_from = _packing(mask.bool(), sizes, items)
            real = packing.sizes
            made |= self._shortened(made, packing, position_from)
            for modality, output in outputs.items():
                own = [item for item in items if item.record.modality == modality]
                outputs[modality] = shortened_features(output, own, records[modality].lengths)
        if outputs:
            made["mm_encoder_outputs"] = outputs

        # Gapped positions with neither padding nor cache would be read as packed samples. And `generate` leaves out a
        # mask without padding, which compiled code takes for another kind of call: in a bucket there is always some.
        width = made["input_ids"].shape[1]
        bare = touched and not self._text_row(positions) and self.plan.plan.positions == "keep"
        slack = min(real) == width and (bucket is not None or (bare and not use_cache))
        made = widened(made, bucketed(width + slack, bucket), self.pad)
        fixed: dict[str, Any] = {}
        if bare and min(real) == made["input_ids"].shape[1]:
            fixed["use_cache"] = True
        if outputs and not self._reads_chunks(made):
            fixed["prefill_chunk_size"] = None
        return Prepared(
            prompt=ids,
            requests=tuple(range(len(sizes))),
            sizes=real,
            ledger=self._ledger(given, ids, sizes, real, items, notes),
            pad=self.pad,
            _inputs=made,
            _first_positions=self._first_positions(made, touched),
            _fixed=fixed,
        )

    def _checked(self, given: dict[str, Any]) -> tuple[Int[Tensor, "b s"], Int[Tensor, "b s"]]:
        """The ids and the mask of the prompt."""
        for name, how in REFUSED.items():
            if name in given:
                raise UnsupportedError(f"prepare does not take {name}: {how}.")
        ids, mask = given.get("input_ids"), given.get("attention_mask")
        if not isinstance(ids, Tensor) or ids.ndim != 2 or not ids.numel():
            raise WinnowError(f"prepare takes input_ids of shape [batch, tokens]; got {_shape(ids)}.")
        if mask is None:
            if bool((ids == self.pad).any()):
                raise WinnowError(
                    f"input_ids hold the padding token {self.pad}, and no attention_mask says whether it pads; pass it."
                )
            mask = torch.ones_like(ids)
        if mask.shape != ids.shape:
            raise UnsupportedError(
                f"prepare takes an attention_mask of the shape of input_ids, {tuple(ids.shape)} (1 real, 0 padding); "
                f"got {_shape(mask)}."
            )
        strange = [n for n, x in given.items() if n not in AS_LONG and _shape(x)[:2] == tuple(ids.shape)]
        if strange:
            raise UnsupportedError(
                f"prepare does not know how to shorten {', '.join(strange)}, which has a value for each token; "
                "use winnow.compress."
            )
        return ids, mask

    def _check_layers(self, longest: int) -> None:
        bound = self.bound
        if not self.plan.plan.methods:
            return
        strange = sorted(set(bound.kinds) - {"full_attention", *WINDOWED, *LINEAR})
        if strange:
            raise UnsupportedError(
                f"{bound.info.model} has layers of the kind {', '.join(strange)}, which may count what lies between "
                "tokens; use winnow.compress."
            )
        kinds = sorted(set(bound.kinds) & set(WINDOWED))
        if not kinds:
            return
        config = bound.lm.config
        sizes = [getattr(config, name, None) for name in ("sliding_window", "attention_chunk_size")]
        window = min((size for size in sizes if isinstance(size, int)), default=0)
        if longest > window:
            raise UnsupportedError(
                f"{bound.info.model} has layers of the kind {', '.join(kinds)} over {window} tokens, and the prompt "
                f"has {longest}: in shortened inputs a window would reach further than the model was trained with. "
                "Use winnow.compress, which counts windows in true positions."
            )

    def _positions(self, given: dict[str, Any], ids: Tensor, mask: Tensor) -> Tensor:
        """`[B, S]` or `[4, B, S]` positions of the prompt as it was given; the model's own rule makes them."""
        found = given.get("position_ids")
        if found is None:
            rest = {name: value for name, value in given.items() if name != "input_ids"}
            found = self.model._prepare_position_ids_for_generation(ids, rest | {"attention_mask": mask})
        return found.expand(*found.shape[:-2], *ids.shape)

    def _encode(self, given: dict[str, Any]) -> tuple[dict[str, Any], set[str]]:
        """What the encoders give, by modality, and the names of the inputs that they read."""
        outputs: dict[str, Any] = {}
        consumed: set[str] = set()
        unread: list[tuple[str, str]] = []
        for name, modality, _ in self.bound.family.encoders:
            encode = getattr(self.model.base_model, name)
            names = [n for n in inspect.signature(encode).parameters if n in given and n != "input_ids"]
            main = next(iter(inspect.signature(encode).parameters))
            if main in names:
                if modality not in OUTPUTS:
                    raise UnsupportedError(
                        f"prepare shortens pictures and videos, and these inputs hold {modality}; use winnow.compress."
                    )
                outputs[modality] = encode(**{n: given[n] for n in names}, return_dict=True)
            elif bool((given["input_ids"] == self.bound.token_ids[modality]).any()):
                unread.append((modality, main))
            consumed.update(names)
        known = {self.bound.token_ids[modality] for modality in outputs}
        for modality, main in unread:
            if self.bound.token_ids[modality] not in known:
                raise WinnowError(
                    f"the prompt holds {modality} placeholders, and the inputs hold no {main}; pass it, or leave the "
                    "placeholders out."
                )
        return outputs, consumed

    def _items(
        self, ids: Tensor, host: Bool[Tensor, "b s"], records: dict[str, Any], outputs: dict[str, Any]
    ) -> list[EncodedItem]:
        """The items of all modalities, in order."""
        items = []
        tokens = ids.cpu()
        for modality, record in records.items():
            spans, _ = find_spans(tokens, self.bound.token_ids[modality], record.lengths, modality)
            if len(spans) != len(record.lengths):
                raise WinnowError(
                    f"the prompt holds the placeholders of {len(spans)} {modality} items for {len(record.lengths)} "
                    "that were given; repeat the pixels with the rows."
                )
            if self.bound.family.joined:
                spans, records[modality] = joined_items(self.bound, spans, record)
            of_videos(self.bound, self.plan, spans, records[modality], None)
            record = records[modality]
            given = by_item(outputs[modality].pooler_output, record.lengths)
            deep = [by_item(layer, record.lengths) for layer in deep_layers(outputs[modality])]
            for span in spans:
                own = [layer[span.number] for layer in deep]
                items.append(EncodedItem.of(span, record, given[span.number], own, host[span.row, span.where]))
        return sorted(items, key=lambda item: (item.row, int(item.where[0])))

    def _questions(self, given: dict[str, Any], ids: Tensor, items: list[EncodedItem]) -> Questions | None:
        """The questions, where a step looks at them."""
        if not self.plan.text_signals:
            return None
        ends = [0] * ids.shape[0]
        for item in items:
            ends[item.row] = max(ends[item.row], int(item.where[-1]) + 1)
        host, table = ids.cpu(), self.model.get_input_embeddings()
        spans = questions_of(self._request(given), given, host, ends)
        embeds = lambda row, at: table(ids[row, at.to(ids.device)])  # noqa: E731
        return Questions(self.engine.reader, host, spans, embeds, self.plan.text_encoder)

    def _request(self, given: dict[str, Any]) -> Request:
        engine, bound = self.engine, self.bound
        clock = Clock(False, bound.device)
        return Request(bound, engine.attachment, self.plan, None, engine.suffix, clock, called=given)

    def _shortened(self, made: dict[str, Any], packing: Packing, position_from: Tensor) -> dict[str, Any]:
        """The per-token inputs of what is left."""
        slots, real = packing.source, packing.mask
        short = {
            name: made[name].gather(1, slots.to(made[name].device)).masked_fill(~real, value)
            for name, value in ({"input_ids": self.pad} | PER_TOKEN).items()
            if name in made
        }
        short["attention_mask"] = real.to(made["attention_mask"].dtype)
        positions, ranks = made["position_ids"], (real.cumsum(1) - 1).clamp_min(0)
        index = position_from.gather(1, slots)
        if self.plan.plan.positions == "compact":
            first = positions.gather(1, made["attention_mask"].argmax(1, keepdim=True))
            short["position_ids"] = first + ranks
        else:
            short["position_ids"] = positions.gather(-1, index.expand(*positions.shape[:-2], *index.shape))
        if self._text_row(positions):
            short["position_ids"][0] = ranks
        short["position_ids"] = short["position_ids"].masked_fill(~real, 0)
        return short

    def _text_row(self, positions: Tensor) -> bool:
        """Whether positions have a row before their axes, which tells packed samples apart and nothing else."""
        rope = getattr(self.bound.lm.config, "rope_parameters", None) or {}
        return positions.ndim == 3 and positions.shape[0] == len(rope.get("mrope_section") or ()) + 1

    def _check_ends(self, host: Bool[Tensor, "b s"], items: list[EncodedItem]) -> None:
        """Refuse where what is generated would go on from another position than behind the prompt."""
        if self.plan.plan.positions == "compact":
            return
        for item in items:
            last = int(host[item.row].nonzero()[-1])
            if int(item.where[-1]) != last:
                continue
            ends = item.separators if item.separators.shape[0] else item.content[item.ids]
            if not ends.shape[0] or int(ends.max()) != item.where.shape[0] - 1:
                raise UnsupportedError(
                    "the prompt ends in a picture whose last token is dropped, so that what is generated would stand "
                    "elsewhere; put text behind the picture, or use positions=compact or winnow.compress."
                )

    def _first_positions(self, made: dict[str, Any], touched: bool) -> Tensor | None:
        """The positions that `generate` hands to the first forward: some classes count from 1, some leave them out."""
        rest = {name: value for name, value in made.items() if name != "input_ids"}
        first = self.model.prepare_inputs_for_generation(made["input_ids"], is_first_iteration=True, **rest)
        found = first.get("position_ids")
        if found is None and touched:
            raise UnsupportedError(
                f"generate of {self.bound.info.model} leaves out the positions that it is given, so that kept tokens "
                "would lose theirs; use winnow.compress."
            )
        return found

    def _reads_chunks(self, made: dict[str, Any]) -> bool:
        """Whether `generate` can prefill this prompt in chunks: it hands each its pictures, and no mask looks ahead."""
        typed = "token_type_ids" in made or ("mm_token_type_ids" in made and not self.bound.info.mrope)
        whole = any(other_fields(output) for output in made["mm_encoder_outputs"].values())
        return hasattr(generation, "_slice_mm_encoder_output") and not typed and not whole

    def _ledger(
        self,
        given: dict[str, Any],
        ids: Tensor,
        sizes: tuple[int, ...],
        real: tuple[int, ...],
        items: list[EncodedItem],
        notes: dict[str, Any],
    ) -> Ledger:
        request, bound = self._request(given), self.bound
        notes = notes if items else {"read_in_full": why_in_full(request, ids)}
        ledger = ledger_of(request, sizes, (real,) * len(bound.layers), notes)
        ledger.items = tuple(item.record for item in items)
        return ledger


def _check_class(model: Any) -> None:
    name = type(model).__name__
    takes = inspect.signature(type(model).forward).parameters
    if "mm_encoder_outputs" not in takes or "position_ids" not in takes or model.config.is_encoder_decoder:
        raise UnsupportedError(
            f"{name} does not take pictures that were encoded before (mm_encoder_outputs) beside position_ids; "
            "use winnow.compress."
        )


def _check_plan(plan: BoundPlan) -> None:
    if plan.frames:
        raise UnsupportedError(
            f"{plan.plan} chooses frames, which happens before a processor makes inputs: use winnow.compress, whose "
            "handle has frames(video)."
        )
    if plan.changes_pictures:
        raise UnsupportedError(
            f"{plan.plan} chooses, cuts or scales pictures, which happens before a processor makes inputs: use "
            "winnow.compress, whose handle has prompt(messages)."
        )
    if stretching(plan) is not None:
        raise UnsupportedError(
            f"{plan.plan} stretches rotary positions, which the model does with inputs as it was trained; use "
            "winnow.compress, or leave them as they are (window=none)."
        )
    if plan.cross_reads:
        raise UnsupportedError(
            f"{plan.plan} reads tokens beside the sequence inside the language model, which inputs cannot hold; use "
            "winnow.compress."
        )
    inside = [step.at for steps in plan.layers.values() for _, step in steps]
    if inside:
        raise UnsupportedError(
            f"{plan.plan} acts inside the language model or looks at it ({', '.join(sorted(set(map(str, inside))))}), "
            "and inputs are shortened before it runs; use winnow.compress, or a method that looks at pictures only."
        )


def _packing(
    mask: Bool[Tensor, "b s"], sizes: tuple[int, ...], items: list[EncodedItem]
) -> tuple[Packing, Int[Tensor, "b s"]]:
    """What is left of each row, padded on the left, and for each logical position the one that its row's comes from."""
    kept, left = mask.clone(), list(sizes)
    position_from = torch.arange(mask.shape[1], device=mask.device).repeat(mask.shape[0], 1)
    for item in items:
        where, stay = item.where, item.left
        kept[item.row, where] = False
        kept[item.row, where[stay]] = True
        left[item.row] += stay.shape[0] - item.seen
        position_from[item.row, where[item.content[item.places]]] = where[item.content[item.ids]]
    return Packing.of(mask, sizes).select(kept, tuple(left))[0], position_from


def _shape(value: Any) -> tuple[int, ...]:
    return tuple(getattr(value, "shape", ()))
