"""Answers: one question about one picture under one plan, what it cost, and what became of the tokens."""

from __future__ import annotations

import base64
import dataclasses
import io
import statistics
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from winnow.bench.clock import busy
from winnow.bench.phases import answer
from winnow.core.errors import UnsupportedError, WinnowError
from winnow.core.plan import Plan
from winnow.core.registry import Entry, entries, method_class
from winnow.engine.compress import compress
from winnow.engine.prompt_items import on_made_inputs
from winnow.models.families import family_of, unwrap
from winnow.models.inputs import model_inputs
from winnow.models.text import Text
from winnow.overlay import Box, covered, shown_box
from winnow.reference.doubts import doubts
from winnow.serve.errors import told
from winnow.studio.asking import Asked, Picture
from winnow.studio.stages import at_layers, stages

LARGEST = 1_024  # pixels of the longer side of a picture as the page shows it


class Asker:
    """The model and its processor. One thread at a time asks it.

    Args:
        name: of the model, as the page shows it.
        bundled: whether it is the bundled reference model, which knows one world.

    Raises:
        UnsupportedError: it is no vision-language model.
    """

    def __init__(self, model: Any, processor: Any, name: str, *, bundled: bool) -> None:
        inner: Any = unwrap(model)
        if isinstance(family_of(inner), Text) or not hasattr(processor, "image_processor"):
            raise UnsupportedError("winnow studio asks about pictures, and this is a language model.")
        self.model, self.processor, self.name, self.bundled = model, processor, name, bundled
        self._content: dict[tuple[int, int], int] = {}

    def methods(self) -> list[dict[str, Any]]:
        """All methods that a plan may name, each with the reason where this model refuses it."""
        return [
            {
                "slug": entry.slug,
                "summary": entry.summary,
                "cache": entry.of_cache,
                "budget": method_class(entry.slug).takes_budgets(),
                "refused": self._refused(entry),
            }
            for entry in entries()
        ]

    def _refused(self, entry: Entry) -> str:
        try:
            with compress(self.model, entry.slug, processor=self.processor) as handle:
                on_made_inputs(handle.bind(entry.slug))
        except WinnowError as error:
            return told(error)
        return ""

    def answer(self, asked: Asked) -> dict[str, Any]:
        """The answer, its costs and times, and the stages of the tokens.

        Raises:
            WinnowError: the question cannot be asked, or the plan does not run on this model.
        """
        noise = busy()
        image = asked.picture.image
        inputs = model_inputs(self.model, self.processor, image, asked.question)
        plan = self._planned(asked, inputs)
        asking = {"max_new_tokens": asked.max_new_tokens, "runs": asked.runs}
        ledger: Any
        if plan.methods:
            with compress(self.model, plan, processor=self.processor) as handle:
                on_made_inputs(handle.bind(plan))
                handle.timing = True
                text, times = answer(self.model, self.processor, inputs, **asking, handle=handle)
                ledger = handle.last
        else:
            text, times = answer(self.model, self.processor, inputs, **asking)
            ledger = self._read_in_full(inputs)
        if not ledger.items:
            raise WinnowError(f"The model read the picture in full, and nothing can be shown: {ledger.read_in_full}.")
        right = _known(asked)
        return {
            "plan": str(plan),
            "answer": text,
            "truth": None if right is None else right[0],
            "ms": times,
            "ran_on": f"{self.model.device}, {str(self.model.dtype).removeprefix('torch.')}",
            "busy": noise,
            "warnings": doubts(asked.question, asked.picture.scene is not None) if self.bundled else [],
            **_costs(ledger),
            **self._tokens(ledger, image.size, () if right is None else right[1]),
        }

    def _planned(self, asked: Asked, inputs: dict[str, Any]) -> Plan:
        if asked.keep is None:
            return asked.plan
        content = self._content.get(asked.picture.image.size)
        if content is None:
            content = self._read_in_full(inputs).items[0].layout.n_content
            if len(self._content) < 1_000:
                self._content[asked.picture.image.size] = content
        method = asked.plan.methods[0].at_budget(asked.keep, content)
        return dataclasses.replace(asked.plan, methods=(method,))

    def _read_in_full(self, inputs: dict[str, Any]) -> Any:
        """The ledger of a prefill without compression."""
        with compress(self.model, Plan(()), processor=self.processor) as handle, torch.inference_mode():
            self.model.generate(**inputs, max_new_tokens=1, do_sample=False)
            return handle.last

    def _tokens(self, ledger: Any, size: tuple[int, int], evidence: Sequence[Box]) -> dict[str, Any]:
        """Where the tokens lie on the picture, as fractions of it, and what became of them."""
        item, shown = ledger.items[0], shown_box(self.processor, size)
        layout, (x0, y0, x1, y1) = item.layout, shown
        scale, shift = np.array([x1 - x0, y1 - y0] * 2), np.array([x0, y0] * 2)
        whole = np.array([*size, *size], dtype=float)
        boxes = (layout.boxes[layout.content] * scale + shift) / whole
        panels = np.unique(layout.place[layout.content][:, :2], axis=0, return_inverse=True)[1].reshape(-1)
        matters = covered(layout, evidence, shown) if evidence else None
        return {
            "boxes": np.where(np.isfinite(boxes), boxes, -1).round(5).tolist(),
            "panel": panels.tolist(),
            "shown": (np.array(shown) / whole).round(5).tolist(),
            "evidence": (np.array(evidence).reshape(-1, 4) / whole).round(5).tolist(),
            "stages": stages(item, matters),
            "layers": at_layers(item, len(ledger.layer_tokens)),
        }


def _known(asked: Asked) -> tuple[str, tuple[Box, ...]] | None:
    """The right answer and its evidence, where the picture is a scene and the question one of its own."""
    drawn = asked.picture.scene
    found = [] if drawn is None else [own for own in drawn.questions if own.text == asked.question]
    return (found[0].answer, tuple(found[0].evidence)) if found else None


def _costs(ledger: Any) -> dict[str, Any]:
    layers = [samples[0] for samples in ledger.layer_tokens]
    return {
        "tokens": {"layers": layers, "mean": statistics.fmean(layers), "prompt": ledger.logical[0]},
        "flops": ledger.flops,
        "flops_full": ledger.flops_full,
        "kv_bytes": ledger.kv_bytes,
        "kv_bytes_full": ledger.kv_bytes_full,
    }


def look(picture: Picture) -> dict[str, Any]:
    """A picture as the page shows it, and the questions that its scene knows."""
    image = picture.image
    preview = image.copy()
    preview.thumbnail((LARGEST, LARGEST))
    file = io.BytesIO()
    preview.save(file, "PNG")
    questions = [] if picture.scene is None else [own.text for own in picture.scene.questions]
    return {
        "width": image.width,
        "height": image.height,
        "preview": "data:image/png;base64," + base64.b64encode(file.getvalue()).decode(),
        "scene": None if picture.scene is None else picture.scene.seed,
        "questions": questions,
    }
