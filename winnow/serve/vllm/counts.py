"""How many placeholders a plan leaves of a picture or a video, before its pixels are encoded.

The methods themselves run on drawn tokens and signals of its shape. What depends on the draw would depend on what it
shows, and is refused.
"""

from __future__ import annotations

import copy
import functools
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from winnow.core.errors import UnsupportedError
from winnow.engine.bound_plan import BoundPlan
from winnow.engine.encoder import run_features
from winnow.engine.encoding import EncoderRecord, Reading
from winnow.serve.vllm.order import items_of
from winnow.serve.vllm.subject import Subject, forget, tower_output

WIDTH = 16  # of the rows on which counts are worked out
DRAWS = 3


@dataclass(frozen=True)
class Counts:
    """What is left of a picture or a video, from its shape.

    Attributes:
        kept: placeholders of each run of a picture; of a video, all.
        content: of them, those that are no newlines or tile breaks.
        whole: content tokens as the encoder gives them.
    """

    kept: tuple[int, ...]
    content: int
    whole: int


def counts_of(
    subject: Subject, plan: BoundPlan, inputs: Mapping[str, Any], runs: tuple[int, ...], modality: str = "image"
) -> Counts:
    """What a plan leaves of a picture or a video, from shapes alone.

    The methods themselves run on drawn tokens and signals; what depends on the draw depends on what is shown.

    Args:
        inputs: of the encoder, by the names of transformers.
        runs: its placeholders, run by run.

    Raises:
        UnsupportedError: the plan leaves another number for another picture, or nothing; or it chooses frames.
    """
    what = "picture" if modality == "image" else modality
    if plan.frames and modality == "video":
        raise UnsupportedError(
            f"{plan.plan} chooses frames before a processor reads them, and vLLM has chosen them before winnow is "
            "asked; use a method that acts on tokens alone."
        )
    record = subject.record(plan, inputs, items_of(modality, runs), modality)
    key = (plan.plan.key, modality, record.layouts)
    if key not in subject.counted:
        found = {_drawn(subject, record, draw) for draw in range(DRAWS)}
        if len(found) > 1:
            shown = " or ".join(map(str, sorted({counts.content for counts in found})))
            raise UnsupportedError(
                f"{plan.plan} keeps {shown} of {sum(runs)} tokens, as the {what} is: vLLM must know the number "
                f"before the {what} is encoded. Set a budget (keep=…), or use a method that has one."
            )
        forget(subject.counted)
        (subject.counted[key],) = found
    if 0 in subject.counted[key].kept:
        raise UnsupportedError(f"{plan.plan} can keep nothing of a {what}, which vLLM cannot serve; keep more.")
    return subject.counted[key]


def _drawn(subject: Subject, record: EncoderRecord, draw: int) -> Counts:
    """What a plan leaves of drawn tokens and signals; the last draw has nothing in it that differs."""
    record = copy.copy(record)
    record.readings, record.items = {}, []
    generator = torch.Generator().manual_seed(draw)
    drawn = torch.ones if draw == DRAWS - 1 else functools.partial(torch.randn, generator=generator)
    plan: Any = record.plan
    if plan.features:
        _draw_tower(subject, record, drawn, generator, len(record.lengths))
    starts = subject.bound.family.cell_starts(subject.bound.model, record)
    cells = max(start + int(x.cell.max()) + 1 for start, x in zip(starts, record.layouts, strict=True))
    for signal in plan.tower_signals:
        values = signal.sample(generator, 1, cells)[0]
        reading = record.readings.setdefault(signal, Reading())
        reading.joined = drawn(values.shape) if draw == DRAWS - 1 else values
    with torch.no_grad():
        short = subject.shorten(record, [drawn((n, WIDTH)) for n in record.lengths])
    kept = tuple(own.rows.shape[0] for own in short)
    whole = sum(layout.n_content for layout in record.layouts)
    return Counts(kept, sum(own.content for own in short), whole)


def _draw_tower(subject: Subject, record: EncoderRecord, drawn: Any, generator: torch.Generator, items: int) -> None:
    """Run the steps at `features` on a drawn output of the tower."""
    family, model = subject.bound.family, subject.bound.model
    counts = family.tile_counts(model, record, items)
    tokens = sum(layout.n for layout in family.tower_layouts(model, record, counts)) // sum(counts)
    prefix = int(subject.bound.info.has_cls)
    plan: Any = record.plan
    for signal in {signal for _, step in plan.features for signal in step.needs}:
        values = signal.sample(generator, sum(counts), tokens if signal.covers_prefix else tokens - prefix)
        same = drawn is torch.ones
        record.readings[signal] = Reading(
            [torch.ones_like(values) if same else values], prefix if signal.covers_prefix else 0
        )
    record.tower_output = tower_output(model, drawn((sum(counts), tokens, WIDTH)))
    run_features(subject.request(plan, record, torch.device("cpu")))
