"""The front end: how many placeholders of each picture and video stay, before its pixels are encoded.

One mixin over the processor of whatever model vLLM has. The placeholders of a picture are unbroken runs (its tiles, its
rows, or all of it) between markers of the model; each run is an item of the library, and the library's methods say how
many of it stay. The markers stay. A video is one item. Where text stands between its frames, the worker puts it among
the tokens that it keeps, and placeholders hold its place in the prompt.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from winnow import __version__
from winnow.core.errors import WinnowError
from winnow.core.plan import Plan
from winnow.serve.vllm.counts import Counts, counts_of
from winnow.serve.vllm.inputs import MODALITIES, PIXELS, of_item
from winnow.serve.vllm.order import FIELD, Order, items_of
from winnow.serve.vllm.placeholders import held, marks_of, runs_of, shortened
from winnow.serve.vllm.pruning import unpruned
from winnow.serve.vllm.settings import KEY, Settings, parsed
from winnow.serve.vllm.subject import Subject, subject_of

DUMMY = object()  # in the place of what a request says, while vLLM measures memory
PROBED = 4096  # tokens of the largest picture on which plans are tried out when the server starts


class CompressingProcessor:
    """Mixed into a processor of vLLM.

    Attributes:
        settings: of the operator; None: the model is served as it is.
        subject: the served model.
    """

    info: Any
    settings: Any
    subject: Subject

    def _plan(self, kwargs: Mapping[str, Any]) -> Plan | None:
        """The plan of a request; None where the operator did not ask for winnow."""
        if kwargs.get(KEY) is DUMMY:
            return Plan(())
        if self.settings is not None:
            return self.settings.chosen(kwargs.get(KEY), self.subject.positions)
        if KEY in kwargs:
            raise WinnowError(
                f"this server was started without {KEY}: name a plan under {KEY!r} in --hf-overrides, or leave {KEY!r} "
                "out of mm_processor_kwargs."
            )
        return None

    def get_dummy_inputs(self, *args: Any, **kwargs: Any) -> Any:
        """Memory is measured on uncompressed pictures, the largest that a request can ask for."""
        inputs = super().get_dummy_inputs(*args, **kwargs)  # type: ignore[misc]
        return inputs if self.settings is None else replace(inputs, hf_processor_mm_kwargs={KEY: DUMMY})

    def apply(self, inputs: Any, timing_ctx: Any) -> Any:
        made = super().apply(inputs, timing_ctx)  # type: ignore[misc]
        plan = self._plan(inputs.hf_processor_mm_kwargs)
        if plan is None or not plan.methods or self.subject.positions == "compact":
            return made
        ends = [place.offset + place.length for own in MODALITIES for place in made["mm_placeholders"].get(own, ())]
        if ends and max(ends) == len(made["prompt_token_ids"]):
            raise WinnowError(
                "the prompt ends in a picture or a video, behind which vLLM would go on from the position of the last "
                "token that is kept; put text, or the mark of its end, behind it."
            )
        return made

    def _apply_hf_processor_main(self, mm_items: Any, hf_kwargs: Mapping[str, Any]) -> Any:
        with unpruned(self.info):
            return super()._apply_hf_processor_main(mm_items, _without(hf_kwargs))  # type: ignore[misc]

    def _get_cache_missing_processor_kwargs(self, inputs: Any, mm_is_cached: Any) -> Mapping[str, Any]:
        given = inputs.hf_processor_mm_kwargs
        plain = replace(inputs, hf_processor_mm_kwargs=_without(given))
        missing = super()._get_cache_missing_processor_kwargs(plain, mm_is_cached)  # type: ignore[misc]
        return {**missing, KEY: given[KEY]} if KEY in given else missing

    def _get_mm_fields_config(self, hf_inputs: Any, hf_processor_mm_kwargs: Mapping[str, Any]) -> Any:
        return super()._get_mm_fields_config(hf_inputs, _without(hf_processor_mm_kwargs))  # type: ignore[misc]

    def _get_mm_hashes(self, inputs: Any) -> Any:
        """The resolved plan is part of the identity of a picture or a video in every cache."""
        plan = self._plan(inputs.hf_processor_mm_kwargs)
        plain = replace(inputs, hf_processor_mm_kwargs=_without(inputs.hf_processor_mm_kwargs))
        hashes = dict(super()._get_mm_hashes(plain))  # type: ignore[misc]
        if plan is None:
            return hashes
        key = self.subject.bind(plan.key).resolved.key
        digest = hashlib.sha256(f"{__version__}|{key}".encode()).hexdigest()[:16]
        return hashes | {
            modality: [f"{own}-{KEY}-{digest}" for own in hashes[modality]]
            for modality in MODALITIES
            if modality in hashes
        }

    def _get_mm_prompt_updates(self, mm_items: Any, hf_processor_mm_kwargs: Any, out_mm_kwargs: Any) -> Any:
        plan = self._plan(hf_processor_mm_kwargs)
        plain = _without(hf_processor_mm_kwargs)
        with unpruned(self.info):
            updates = super()._get_mm_prompt_updates(mm_items, plain, out_mm_kwargs)  # type: ignore[misc]
        if plan is None:
            return updates
        dummy = hf_processor_mm_kwargs.get(KEY) is DUMMY
        taken = {modality: items for modality, items in updates.items() if self.subject.takes(modality)}
        others = sorted(modality for modality, items in updates.items() if items and modality not in taken)
        if others and not dummy:
            raise WinnowError(
                f"{KEY} does not serve the {others[0]} of {self.subject.bound.info.model} under vLLM, and this request "
                f"holds one; ask without it, or a server that was started without {KEY}."
            )
        return dict(updates) | {
            modality: [
                self._shortened(plan, own, out_mm_kwargs[modality][number], modality, dummy)
                for number, own in enumerate(items)
            ]
            for modality, items in taken.items()
        }

    def _shortened(self, plan: Plan, updates: Sequence[Any], item: Any, modality: str, dummy: bool) -> list[Any]:
        """The updates of one item with the placeholders that stay, and its order among what the worker is given."""
        runs = runs_of(updates[0].content)
        from vllm.multimodal.inputs import MultiModalBatchedField, MultiModalFieldElem

        given, what = item.get_data(), "picture" if modality == "image" else modality
        if PIXELS[modality] not in given:
            raise WinnowError(f"{KEY} needs the pixels of a {what}, and this request brings its embeddings.")
        if not runs or any(runs_of(update.content) != runs for update in updates):
            raise WinnowError(f"vLLM gives this {what} placeholders that {KEY} does not understand.")
        marks = marks_of(updates[0].content) if modality == "video" and plan.methods else ()
        counts = Counts(items_of(modality, runs), sum(runs), sum(runs))
        if plan.methods:
            counts = counts_of(self.subject, self.subject.bind(plan.key), of_item(given), runs, modality)
        if dummy and modality == "image" and sum(runs) <= PROBED:  # what vLLM cannot serve is refused at the start
            for text in self.settings.allowed:
                bound = self.subject.bind(parsed(text, self.subject.positions).key)
                counts_of(self.subject, bound, of_item(given), runs)
        if not dummy:
            self.settings.check_kept(counts.content, counts.whole, what)
        data = Order(plan.key, runs, counts.kept, modality, marks).encoded()
        item[FIELD] = MultiModalFieldElem(data=data, field=MultiModalBatchedField(keep_on_cpu=True))
        if not plan.methods:
            return list(updates)
        if marks:
            return [update.with_content(held(update.content, counts.kept[0])) for update in updates]
        return [update.with_content(shortened(update.content, counts.kept)) for update in updates]


def compressing(factories: Any) -> Any:
    """vLLM's factories of a processor, with one that compresses."""

    def build(info: Any, dummy_inputs: Any) -> Any:
        plain = factories.processor(info, dummy_inputs)
        kind = type(plain)
        made: Any = object.__new__(type(f"Compressing{kind.__name__}", (CompressingProcessor, kind), {}))
        made.__dict__.update(plain.__dict__)
        config = info.ctx.model_config.hf_config
        made.settings = Settings.of(config)
        if made.settings is not None:
            made.subject = subject_of(config)
        return made

    return replace(factories, processor=build)


def _without(kwargs: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in kwargs.items() if name != KEY}
