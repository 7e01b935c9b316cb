"""Subject: the model that vLLM serves, as winnow's adapters and methods see it.

The adapter of a family reads configurations and shapes. It is given a transformers model of the same configuration
without weights, so that layouts, cells of the tower and points are the library's own, and nothing of them is written
twice. A plan is bound to it with the points that vLLM has.
"""

from __future__ import annotations

import copy
import functools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from winnow.core.errors import UnsupportedError
from winnow.core.ledger import add_notes
from winnow.core.plan import Plan
from winnow.engine.bound_model import BoundModel
from winnow.engine.bound_plan import BoundPlan
from winnow.engine.clock import Clock
from winnow.engine.encoded_item import EncodedItem, run_projected
from winnow.engine.encoder import placed, run_features, settle
from winnow.engine.encoding import EncoderRecord, Reading
from winnow.engine.item_tokens import Span
from winnow.engine.request import Attachment, Request
from winnow.engine.runner import StepRunner
from winnow.models.families import family_of

POINTS = ("features", "projected")
WIDTH = 16  # of the rows on which counts are worked out
DRAWS = 3


@dataclass(frozen=True, eq=False)
class Shortened:
    """What is left of one run of placeholders.

    Attributes:
        rows: `[m, D]` what stands at the placeholders that stay; with deepstack, `[m, D · (1 + layers)]`.
        places: `[m]` the placeholder, of those of the run, whose position each of them has.
    """

    rows: Tensor
    places: Tensor


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
        self._counts: dict[Any, tuple[int, ...]] = {}

    @property
    def positions(self) -> str:
        """The one position policy that vLLM has for this model."""
        return "keep" if self.bound.info.mrope else "compact"

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
            self._plans[key] = bound
        return self._plans[key]

    def record(self, plan: BoundPlan, inputs: Mapping[str, Any], runs: Sequence[int]) -> EncoderRecord:
        """The record of an encoder call whose items are runs of placeholders.

        Args:
            inputs: of the encoder, by the names of transformers.
            runs: placeholders of each run.
        """
        family, model = self.bound.family, self.bound.model
        record = EncoderRecord("image", inputs, lengths=tuple(runs), plan=plan)
        if family.joined:
            tile = family.side(model, record) ** 2  # type: ignore[attr-defined]
            record.parts = tuple(n // tile for n in runs)
        record.layouts = family.layouts(model, record)
        return record

    def request(self, plan: BoundPlan, record: EncoderRecord, device: torch.device) -> Request:
        """What the library's encoder pass runs in, for one call of the encoder."""
        bound = replace(self.bound, device=device)
        request = Request(bound, Attachment(bound), plan, None, None, Clock(False, device))
        request.encoding = record
        return request

    def shorten(self, record: EncoderRecord, rows: Sequence[Tensor], width: int = 0) -> list[Shortened]:
        """Run the plan's steps on the rows of each run.

        Args:
            rows: `[runs][n, D]` as the encoder gave them.
            width: D of the language model, where rows carry those of deepstack layers beside them; 0: they do not.
        """
        plan: Any = record.plan
        if record.items:
            settle(record)
        if record.reduced:
            rows = [placed(x, *own) for x, *own in zip(rows, record.items, record.layouts, strict=True)]
        items = []
        for number, own in enumerate(rows):
            parts = own.split(width or own.shape[-1], dim=-1)
            span = Span(0, number, torch.arange(own.shape[0]))
            seen = torch.ones(own.shape[0], dtype=torch.bool)
            items.append(EncodedItem.of(span, record, parts[0], parts[1:], seen))
        bound = self.bound if not rows else replace(self.bound, device=rows[0].device)
        notes: dict[str, Any] = {}
        run_projected(StepRunner(plan, lambda more: add_notes(notes, more)), bound, items, {"image": record})
        return [_shortened(item, own, width) for item, own in zip(items, rows, strict=True)]

    def counts(self, plan: BoundPlan, inputs: Mapping[str, Any], runs: Sequence[int]) -> tuple[int, ...]:
        """The placeholders of each run that a plan leaves, from shapes alone.

        The methods themselves run on drawn tokens and signals; what depends on the draw depends on the picture.

        Raises:
            UnsupportedError: the plan leaves another number for another picture, or nothing.
        """
        record = self.record(plan, inputs, runs)
        key = (plan.plan.key, record.layouts)
        if key not in self._counts:
            found = {self._drawn(record, runs, draw) for draw in range(DRAWS)}
            if len(found) > 1:
                shown = " or ".join(str(sum(counts)) for counts in sorted(found))
                raise UnsupportedError(
                    f"{plan.plan} keeps {shown} of {sum(runs)} tokens, as the picture is: vLLM must know the number "
                    "before the picture is encoded. Set a budget (keep=…), or use a method that has one."
                )
            (self._counts[key],) = found
        if 0 in self._counts[key]:
            raise UnsupportedError(f"{plan.plan} can keep nothing of a picture, which vLLM cannot serve; keep more.")
        return self._counts[key]

    def _drawn(self, record: EncoderRecord, runs: Sequence[int], draw: int) -> tuple[int, ...]:
        """What a plan leaves of drawn tokens and signals; the last draw has nothing in it that differs."""
        record = copy.copy(record)
        record.readings, record.items = {}, []
        generator = torch.Generator().manual_seed(draw)
        drawn = torch.ones if draw == DRAWS - 1 else functools.partial(torch.randn, generator=generator)
        plan: Any = record.plan
        if plan.features:
            self._draw_tower(record, drawn, generator, len(runs))
        starts = self.bound.family.cell_starts(self.bound.model, record)
        cells = max(start + int(x.cell.max()) + 1 for start, x in zip(starts, record.layouts, strict=True))
        for signal in plan.tower_signals:
            values = signal.sample(generator, 1, cells)[0]
            reading = record.readings.setdefault(signal, Reading())
            reading.joined = drawn(values.shape) if draw == DRAWS - 1 else values
        with torch.no_grad():
            short = self.shorten(record, [drawn((n, WIDTH)) for n in runs])
        return tuple(own.rows.shape[0] for own in short)

    def _draw_tower(self, record: EncoderRecord, drawn: Any, generator: torch.Generator, items: int) -> None:
        """Run the steps at `features` on a drawn output of the tower."""
        family, model = self.bound.family, self.bound.model
        counts = family.tile_counts(model, record, items)
        tokens = sum(layout.n for layout in family.tower_layouts(model, record, counts)) // sum(counts)
        prefix = int(self.bound.info.has_cls)
        plan: Any = record.plan
        for signal in {signal for _, step in plan.features for signal in step.needs}:
            values = signal.sample(generator, sum(counts), tokens if signal.covers_prefix else tokens - prefix)
            same = drawn is torch.ones
            record.readings[signal] = Reading(
                [torch.ones_like(values) if same else values], prefix if signal.covers_prefix else 0
            )
        record.tower_output = tower_output(model, drawn((sum(counts), tokens, WIDTH)))
        run_features(self.request(plan, record, torch.device("cpu")))


def tower_output(model: Any, features: Tensor) -> Any:
    """What a tower gives, as adapters read it.

    Args:
        features: `[tiles, N, C]` the output of the block that feeds the projector, [CLS] included.
    """
    return SimpleNamespace(hidden_states={model.config.vision_feature_layer: features})


def _shortened(item: EncodedItem, given: Tensor, width: int) -> Shortened:
    parts = given.split(width or given.shape[-1], dim=-1)
    rows = [item.features(part, own) for part, own in zip(parts, [item.rows, *item.deep], strict=True)]
    places = torch.arange(given.shape[0], device=given.device)
    places[item.content[item.places]] = item.content[item.ids]
    return Shortened(torch.cat(rows, -1), places[item.left])


def check_positions(plan: Plan, known: str, model: str) -> None:
    """Refuse a position policy that vLLM does not have for a model."""
    if plan.methods and plan.positions != known:
        why = (
            "numbers the tokens of a prompt without gaps"
            if known == "compact"
            else "gives kept tokens their 3-D positions"
        )
        raise UnsupportedError(f"positions={plan.positions}: for {model}, vLLM {why}; write | positions={known}.")


def check_eligible(plan: BoundPlan) -> None:
    """Refuse what vLLM cannot give a method: it encodes a picture before, and for, all questions about it."""
    text = plan.plan
    if plan.reads_text or plan.text_signals or plan.needs_text_encoder:
        raise UnsupportedError(
            f"{text} reads the question. vLLM encodes a picture once for all questions about it, and before it knows "
            "one; use a method that looks at the picture alone."
        )
    if plan.layers or plan.kv:
        raise UnsupportedError(
            f"{text} acts inside the language model or looks at it; under vLLM methods act on what the encoder gives."
        )
    if plan.modules:
        raise UnsupportedError(
            f"{text} has trained weights, which cannot be checked against the model that vLLM has loaded; use a "
            "method that was not trained."
        )
    elsewhere = sorted({site.stack for site in plan.listeners} - {"vision", "pixels"})
    if elsewhere:
        raise UnsupportedError(f"{text} looks at the {elsewhere[0]}, which winnow does not show it under vLLM.")
    for method in plan.resolved.methods:
        if method.streaming:
            raise UnsupportedError(f"{method.slug} remembers earlier pictures of a request, which vLLM does not keep.")
