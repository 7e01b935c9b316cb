"""The front end: how many placeholders of each picture stay, before its pixels are encoded.

One mixin over the processor of whatever model vLLM has. The placeholders of a picture are unbroken runs (its tiles, its
rows, or all of it) between markers of the model; each run is an item of the library, and the library's methods say how
many of it stay. The markers stay.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import replace
from itertools import groupby
from typing import Any

import torch
from torch import Tensor

from winnow import __version__
from winnow.core.errors import WinnowError
from winnow.core.plan import Plan
from winnow.serve.vllm.counts import Counts, counts_of
from winnow.serve.vllm.inputs import of_item
from winnow.serve.vllm.order import FIELD, Order
from winnow.serve.vllm.settings import KEY, Settings, parsed
from winnow.serve.vllm.subject import Subject, subject_of

MODALITY = "image"
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
        pictures = made["mm_placeholders"].get(MODALITY)
        plan = self._plan(inputs.hf_processor_mm_kwargs)
        if plan is None or not plan.methods or not pictures or self.subject.positions == "compact":
            return made
        if pictures[-1].offset + pictures[-1].length == len(made["prompt_token_ids"]):
            raise WinnowError(
                "the prompt ends in a picture, behind which vLLM would go on from the position of the last token that "
                "is kept; put text, or the mark of the end of a picture, behind it."
            )
        return made

    def _apply_hf_processor_main(self, mm_items: Any, hf_kwargs: Mapping[str, Any]) -> Any:
        return super()._apply_hf_processor_main(mm_items, _without(hf_kwargs))  # type: ignore[misc]

    def _get_mm_fields_config(self, hf_inputs: Any, hf_processor_mm_kwargs: Mapping[str, Any]) -> Any:
        return super()._get_mm_fields_config(hf_inputs, _without(hf_processor_mm_kwargs))  # type: ignore[misc]

    def _get_mm_hashes(self, inputs: Any) -> Any:
        """The resolved plan is part of a picture's identity in every cache."""
        plan = self._plan(inputs.hf_processor_mm_kwargs)
        plain = replace(inputs, hf_processor_mm_kwargs=_without(inputs.hf_processor_mm_kwargs))
        hashes = dict(super()._get_mm_hashes(plain))  # type: ignore[misc]
        if plan is None or MODALITY not in hashes:
            return hashes
        key = self.subject.bind(plan.key).resolved.key
        digest = hashlib.sha256(f"{__version__}|{key}".encode()).hexdigest()[:16]
        return hashes | {MODALITY: [f"{own}-{KEY}-{digest}" for own in hashes[MODALITY]]}

    def _get_mm_prompt_updates(self, mm_items: Any, hf_processor_mm_kwargs: Any, out_mm_kwargs: Any) -> Any:
        plan = self._plan(hf_processor_mm_kwargs)
        plain = _without(hf_processor_mm_kwargs)
        updates = super()._get_mm_prompt_updates(mm_items, plain, out_mm_kwargs)  # type: ignore[misc]
        dummy = hf_processor_mm_kwargs.get(KEY) is DUMMY
        others = sorted(modality for modality, items in updates.items() if items and modality != MODALITY)
        if plan is not None and not dummy and others:
            raise WinnowError(
                f"a server with {KEY} reads pictures, and this request holds {', '.join(others)}; serve it by one "
                "without."
            )
        if plan is None or MODALITY not in updates:
            return updates
        items = [
            self._shortened(plan, own, out_mm_kwargs[MODALITY][number], dummy)
            for number, own in enumerate(updates[MODALITY])
        ]
        return dict(updates) | {MODALITY: items}

    def _shortened(self, plan: Plan, updates: Sequence[Any], item: Any, dummy: bool) -> list[Any]:
        """The updates of one picture with the placeholders that stay, and its order among what the worker is given."""
        runs = runs_of(updates[0].content)
        from vllm.multimodal.inputs import MultiModalBatchedField, MultiModalFieldElem

        given = item.get_data()
        if "pixel_values" not in given:
            raise WinnowError(f"{KEY} needs the pixels of a picture, and this request brings its embeddings.")
        if not runs or any(runs_of(update.content) != runs for update in updates):
            raise WinnowError("vLLM gives this picture placeholders that winnow does not understand.")
        counts = Counts(runs, sum(runs), sum(runs))
        if plan.methods:
            counts = counts_of(self.subject, self.subject.bind(plan.key), of_item(given), runs)
        if dummy and sum(runs) <= PROBED:  # a plan that vLLM cannot serve is refused when the server starts
            for text in self.settings.allowed:
                bound = self.subject.bind(parsed(text, self.subject.positions).key)
                counts_of(self.subject, bound, of_item(given), runs)
        if not dummy:
            self.settings.check_kept(counts.content, counts.whole)
        data = Order(plan.key, runs, counts.kept).encoded()
        item[FIELD] = MultiModalFieldElem(data=data, field=MultiModalBatchedField(keep_on_cpu=True))
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


def runs_of(content: Any) -> tuple[int, ...]:
    """The lengths of the unbroken runs of placeholders in what stands for a picture."""
    return tuple(len(list(run)) for placeholder, run in groupby(_mask(content)) if placeholder)


def shortened(content: Any, kept: Sequence[int]) -> Any:
    """What stands for a picture, with only `kept` placeholders of each run."""
    from vllm.multimodal.processing import PromptUpdateDetails

    tokens: list[int] = []
    mask: list[bool] = []
    left = iter(kept)
    pairs = zip(content.full, _mask(content), strict=True)
    for placeholder, run in groupby(pairs, key=lambda pair: pair[1]):
        own = [token for token, _ in run]
        own = own[: next(left)] if placeholder else own
        tokens += own
        mask += [placeholder] * len(own)
    if content.is_embed is None:
        return PromptUpdateDetails(full=tokens)
    return PromptUpdateDetails(full=tokens, is_embed=FixedMask(tuple(mask)))


class FixedMask:
    """Which tokens are placeholders. A class, because vLLM's caches pickle it."""

    def __init__(self, mask: tuple[bool, ...]) -> None:
        self.mask = mask

    def __call__(self, full: list[int]) -> Tensor:
        if len(full) != len(self.mask):
            raise WinnowError(f"vLLM asks for a mask of {len(full)} tokens, of which winnow knows {len(self.mask)}.")
        return torch.tensor(self.mask)


def _mask(content: Any) -> list[bool]:
    return [True] * len(content.full) if content.is_embed is None else content.is_embed(content.full).tolist()


def _without(kwargs: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in kwargs.items() if name != KEY}
