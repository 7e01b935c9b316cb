"""Subject: the model that vLLM serves, as winnow's adapters and methods see it.

The adapter of a family reads configurations and shapes. It is given a transformers model of the same configuration
without weights, so that layouts, cells of the tower and points are the library's own, and nothing of them is written
twice. A plan is bound to it with the points that vLLM has.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from types import SimpleNamespace
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from winnow.core.ledger import add_notes
from winnow.core.plan import Plan
from winnow.engine.bound_model import BoundModel
from winnow.engine.bound_plan import BoundPlan
from winnow.engine.clock import Clock
from winnow.engine.encoded_item import EncodedItem, run_projected
from winnow.engine.encoder import placed, settle
from winnow.engine.encoding import EncoderRecord
from winnow.engine.item_tokens import Span
from winnow.engine.request import Attachment, Request
from winnow.engine.runner import StepRunner
from winnow.models.families import family_of
from winnow.serve.vllm.eligible import check_eligible, check_positions

# A method may leave out what a model has no point for. That would be silent, so points ahead of the processor and the
# cache are among these: a plan that acts at frames is refused for videos, and at the others always.
POINTS = ("prompt", "frames", "pixels", "features", "projected", "kv")
REMEMBERED = 4096  # plans, and counts: requests make new ones


@dataclass(frozen=True, eq=False)
class Shortened:
    """What is left of one run of placeholders, or of a video.

    Attributes:
        content: how many of them are no newlines or tile breaks.
        rows: `[m, D]` what stands at the placeholders that stay; with deepstack, `[m, D · (1 + layers)]`.
        slots: `[m]` these placeholders, among those of the run.
        places: `[m]` the placeholder whose position each of them has.
    """

    content: int
    rows: Float[Tensor, "m d"]
    slots: Int[Tensor, " m"]
    places: Int[Tensor, " m"]


class Subject:
    """A served model.

    Args:
        config: its configuration, of transformers.
    """

    def __init__(self, config: Any) -> None:
        from transformers import AutoModelForImageTextToText

        config = copy.deepcopy(config)
        with torch.device("meta"):
            model = AutoModelForImageTextToText.from_config(config)
        bound = BoundModel.of(model, family_of(model))
        info = replace(bound.info, points=tuple(p for p in POINTS if p in bound.info.points), fingerprint=None)
        self.bound = replace(bound, info=info, device=torch.device("cpu"))
        self._plans: dict[str, BoundPlan] = {}
        self.counted: dict[Any, Any] = {}

    @property
    def positions(self) -> str:
        """The one position policy that vLLM has for this model."""
        return "keep" if self.bound.info.mrope else "compact"

    def takes(self, modality: str) -> bool:
        """Whether the library knows items of a modality in this model as vLLM has them."""
        family = self.bound.family
        frames = modality == "video" and family.frames_apart and family.joined  # named by vLLM as one video
        return frames or any(own == modality for _, own, _ in family.encoders)

    def bind(self, key: str) -> BoundPlan:
        """A plan, checked for this model under vLLM.

        Args:
            key: of the plan.

        Raises:
            UnsupportedError, WinnowError: it cannot run there, and why.
        """
        if key not in self._plans:
            plan = Plan.parse(key)
            check_positions(plan, self.positions, self.bound.info.model)
            bound = BoundPlan.of(plan, self.bound.info)
            check_eligible(bound)
            forget(self._plans)
            self._plans[key] = bound
        return self._plans[key]

    def record(
        self, plan: BoundPlan, inputs: Mapping[str, Any], items: Sequence[int], modality: str = "image"
    ) -> EncoderRecord:
        """The record of an encoder call whose items are runs of placeholders, or videos.

        Args:
            inputs: of the encoder, by the names of transformers.
            items: placeholders of each.
        """
        family, model = self.bound.family, self.bound.model
        record = EncoderRecord(modality, inputs, lengths=tuple(items), plan=plan)
        if family.joined:
            tile = family.side(model, record) ** 2  # type: ignore[attr-defined]
            record.parts = tuple(n // tile for n in items)
        record.layouts = family.layouts(model, record)
        return record

    def request(self, plan: BoundPlan, record: EncoderRecord, device: torch.device) -> Request:
        """What the library's encoder pass runs in, for one call of the encoder."""
        bound = replace(self.bound, device=device)
        request = Request(bound, Attachment(bound), plan, None, None, Clock(False, device))
        request.encoding = record
        return request

    def shorten(self, record: EncoderRecord, rows: Sequence[Tensor], width: int = 0) -> list[Shortened]:
        """Run the plan's steps on the rows of each item.

        Args:
            rows: `[items][n, D]` as the encoder gave them.
            width: D of the language model, where rows carry those of deepstack layers beside them; 0: they do not.
        """
        plan: Any = record.plan
        if record.items:
            settle(record)
        if record.reduced:
            reduced = zip(rows, record.items, record.layouts, strict=True)
            rows = [placed(x, item, layout) for x, item, layout in reduced]
        items = []
        for number, own in enumerate(rows):
            parts = own.split(width or own.shape[-1], dim=-1)
            span = Span(0, number, torch.arange(own.shape[0]))
            seen = torch.ones(own.shape[0], dtype=torch.bool)
            items.append(EncodedItem.of(span, record, parts[0], parts[1:], seen))
        bound = self.bound if not rows else replace(self.bound, device=rows[0].device)
        notes: dict[str, Any] = {}
        run_projected(StepRunner(plan, lambda more: add_notes(notes, more)), bound, items, {record.modality: record})
        return [_shortened(item, own, width) for item, own in zip(items, rows, strict=True)]


def tower_output(model: Any, features: Tensor) -> Any:
    """What a tower gives, as adapters read it.

    Args:
        features: `[tiles, N, C]` the output of the block that feeds the projector, [CLS] included.
    """
    return SimpleNamespace(hidden_states={model.config.vision_feature_layer: features})


_subjects: dict[str, Subject] = {}


def subject_of(config: Any) -> Subject:
    """The subject of a configuration, made once in each process."""
    key = config.to_json_string(use_diff=False)
    if key not in _subjects:
        _subjects[key] = Subject(config)
    return _subjects[key]


def forget(found: dict[Any, Any]) -> None:
    """Empty what would grow without end."""
    if len(found) >= REMEMBERED:
        found.clear()


def _shortened(item: EncodedItem, given: Tensor, width: int) -> Shortened:
    parts = given.split(width or given.shape[-1], dim=-1)
    rows = [item.features(part, own) for part, own in zip(parts, [item.rows, *item.deep], strict=True)]
    places = torch.arange(given.shape[0], device=given.device)
    places[item.content[item.places]] = item.content[item.ids]
    return Shortened(item.count, torch.cat(rows, -1), item.left, places[item.left])
