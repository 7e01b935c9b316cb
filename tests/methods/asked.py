"""Views of the sample with what a method of text and pictures looks at, computed once for all its settings."""

from __future__ import annotations

import dataclasses

import torch

from tests.methods.directional import Sample, batches
from winnow.bench.reuse import Encoded, listening
from winnow.contract import Method, View
from winnow.core.plan import Plan
from winnow.engine.encoder import lm_signal
from winnow.engine.encoding import record_of
from winnow.engine.question import QuestionReader
from winnow.engine.spans import template_suffix
from winnow.signals.question import Question


@torch.no_grad()
def asked(sample: Sample, method: Method, scenes: int) -> list[View]:
    """One view for each of the first scenes, at `projected`, with the question as the processor has it."""
    handle, plan = sample.handle, Plan((method,))
    (step,), bound = method.bind(handle.info)[1], handle.bound
    reader, table = QuestionReader.of(bound, sample.processor), handle.model.get_input_embeddings()
    reading, suffix = listening(handle, [plan]), len(template_suffix(sample.processor))
    views: list[View] = []
    alone = [(view, lane) for view in sample.views["projected"] for lane in range(view.b)]
    for own, batch in batches(sample.requests[:scenes]):
        record = record_of(Encoded(handle, reading, batch).under(plan))
        for number, request in enumerate(own):
            view, lane = alone[len(views)]
            ids = request.inputs["input_ids"][0]
            ids = ids[int((ids == handle.model.config.image_token_id).nonzero()[-1]) + 1 : len(ids) - suffix]

            def value(signal, record=record, number=number, view=view, lane=lane, ids=ids):
                if signal.site(handle.info).stack != "text":
                    return lm_signal(bound, record, number, signal)[None]
                words = ids[reader.kept(ids.tolist(), signal.words)]
                return signal.read(Question(table(words), view.tokens[lane]))[None]

            part = {"tokens": view.tokens[lane : lane + 1], "ids": view.ids[lane : lane + 1]}
            views.append(dataclasses.replace(view, **part, signals=step.signals(value), notes={}))
    return views


def left(sample: Sample, views: list[View], reduce) -> torch.Tensor:
    """`[scene, V]` the tokens that are left, or that others stand for."""
    kept = torch.zeros(len(views), views[0].n, dtype=torch.bool)
    return kept.scatter_(1, torch.cat([reduce(view).representatives for view in views]), True)
