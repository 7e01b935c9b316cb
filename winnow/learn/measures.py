"""What the card of a reference model says, measured: accuracy, depth of use, dropping, erasure, held-out glyphs."""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import LlavaForConditionalGeneration, LlavaProcessor

from winnow.learn.evaluate import (
    Sample,
    answers_right,
    by_type,
    draw_sample,
    erased,
    majority,
    one_each,
    visual_tokens,
)
from winnow.reference import MAX_NEW_TOKENS, decode, prompt
from winnow.world import HELD_OUT, TYPES, evidence_mask

SHARES = (0.5, 0.25, 0.125, 0.05)


def _target(accuracy: float, blind: float) -> float:
    """The part of what pictures could add that they do add: (accuracy − blind) / (1 − blind)."""
    return round((accuracy - blind) / (1 - blind), 4) if blind < 1 else 0.0


def scores(sample: Sample, full: list[list[bool]], none: list[list[bool]]) -> dict[str, Any]:
    """Accuracies; "blind" is the larger of the model's without visual tokens and of the best constant answer."""
    accuracy, unseen, constant = by_type(sample, full), by_type(sample, none), majority(sample)
    counts = {kind: sum(q.type == kind for _, q in sample.flat) for kind in TYPES}

    def row(kind: str) -> dict[str, Any]:
        blind = max(unseen[kind], constant[kind])
        return {
            "accuracy": round(accuracy[kind], 4),
            "blind": round(blind, 4),
            "no_image": round(unseen[kind], 4),
            "majority": round(constant[kind], 4),
            "target": _target(accuracy[kind], blind),
        }

    whole = row("overall")
    return {
        "overall": whole["accuracy"],
        "blind": whole["blind"],
        "no_image": whole["no_image"],
        "majority": whole["majority"],
        "target": whole["target"],
        "per_type": {kind: row(kind) | {"n": counts[kind]} for kind in TYPES if counts[kind]},
    }


def depth(model: LlavaForConditionalGeneration, sample: Sample, tokens: Tensor, share: float) -> dict[str, Any]:
    """Accuracy when all visual tokens leave before layer l, on a share of the scenes; the last l removes nothing."""
    part = max(1, int(len(sample.scenes) * share + 1e-9))
    some = Sample(sample.scenes[:part], sample.questions[:part])
    layers = len(model.model.language_model.layers)
    out: dict[str, Any] = {"questions": len(some.flat), "before_layer": {}}
    for layer in range(layers + 1):
        right = answers_right(model, tokens[:part], some.questions, leave_before=layer if layer < layers else None)
        out["before_layer"][str(layer)] = round(by_type(some, right)["overall"], 4)
    values = out["before_layer"]
    whole, blind = values[str(layers)], values["0"]
    out["cost_before_layer_2"] = round((whole - values["2"]) / max(1e-9, whole - blind), 4)
    return out


def dropping(model: LlavaForConditionalGeneration, sample: Sample, tokens: Tensor) -> dict[str, Any]:
    """Overall accuracy with a share of the tokens: random ones, and evidence plus random others.

    Evidence differs between the questions about a picture, so its rows ask one question per picture.
    """
    visual = tokens.shape[1]
    grid = round(visual**0.5)
    generator = torch.Generator().manual_seed(0)
    one = Sample(sample.scenes, tuple((questions[0],) for questions in sample.questions))
    evidence = torch.stack(
        [
            torch.from_numpy(evidence_mask(q[0].evidence, s.size, grid).reshape(-1))
            for s, q in zip(one.scenes, one.questions, strict=True)
        ]
    ).float()
    out: dict[str, Any] = {
        "questions": len(one.flat),
        "full": round(by_type(one, answers_right(model, tokens, one.questions))["overall"], 4),
        "random": {},
        "evidence_and_random": {},
    }
    for share in SHARES:
        count = max(1, round(share * visual))
        noise = torch.rand(len(tokens), visual, generator=generator)
        for name, score in (("random", noise), ("evidence_and_random", noise + evidence)):
            keep = score.topk(count, -1).indices.sort(-1).values
            right = answers_right(model, tokens, one.questions, keep=keep)
            out[name][str(share)] = round(by_type(one, right)["overall"], 4)
    return out


def by_labels(sample: Sample, full: list[list[bool]]) -> dict[str, Any]:
    """Reading and referring by the number of labels in the picture: an average would hide guessing among them."""
    groups: dict[str, dict[str, list[bool]]] = {"reading": {}, "referring": {}}
    for drawn, questions, marks in zip(sample.scenes, sample.questions, full, strict=True):
        labels = min(
            6, sum(item.kind == "text" and item.partner.kind != "text" for item in drawn.objects if item.partner)
        )
        for question, mark in zip(questions, marks, strict=True):
            if question.type in groups:
                groups[question.type].setdefault(str(labels), []).append(mark)
    return {
        kind: {k: {"accuracy": round(sum(v) / len(v), 4), "n": len(v)} for k, v in sorted(rows.items())}
        for kind, rows in groups.items()
    }


def erasure(model: LlavaForConditionalGeneration, per_type: int, size: int) -> dict[str, Any]:
    """Accuracy by type with the evidence painted over, and with the same area elsewhere painted over."""
    drawn = draw_sample(per_type, size, seed=1 << 20)
    kept = [(s, tuple(q for q in qs if q.evidence)) for s, qs in zip(drawn.scenes, drawn.questions, strict=True)]
    sample = Sample(tuple(s for s, q in kept if q), tuple(q for _, q in kept if q))
    rng = random.Random(0)
    accuracies = {
        "intact": by_type(sample, one_each(model, sample, lambda s, q: s.pixels)),
        "evidence_erased": by_type(sample, one_each(model, sample, lambda s, q: erased(s, q, False, rng))),
        "elsewhere_erased": by_type(sample, one_each(model, sample, lambda s, q: erased(s, q, True, rng))),
    }
    return {
        "questions": len(sample.flat),
        **{kind: {name: round(a[kind], 4) for name, a in accuracies.items()} for kind in (*TYPES, "overall")},
    }


def held_out(model: LlavaForConditionalGeneration, per_type: int, size: int) -> dict[str, Any]:
    """Questions that name a glyph which no training question named; it was seen in pretraining and alignment only."""
    types = ("presence", "count", "relation", "place", "reading", "referring", "comparison")
    sample = draw_sample(per_type, size, split="heldout_glyphs", types=types)
    tokens = visual_tokens(model, [s.pixels for s in sample.scenes])
    right = by_type(sample, answers_right(model, tokens, sample.questions))
    blind = by_type(sample, answers_right(model, tokens[:, :0], sample.questions))
    constant = majority(sample)
    return {
        "glyphs": sorted(HELD_OUT),
        "questions": len(sample.flat),
        "overall": round(right["overall"], 4),
        "blind": round(max(blind["overall"], constant["overall"]), 4),
        "per_type": {
            kind: {"accuracy": round(right[kind], 4), "blind": round(max(blind[kind], constant[kind]), 4)}
            for kind in types
        },
    }


def generate_check(
    model: LlavaForConditionalGeneration,
    processor: LlavaProcessor,
    sample: Sample,
    full: Sequence[Sequence[bool]],
    count: int = 78,
) -> dict[str, int]:
    """Ask `count` questions of the sample, spread over it, through the processor and `generate`, and compare marks."""
    marked = [(s, q, m) for (s, q), m in zip(sample.flat, (m for row in full for m in row), strict=True)]
    chosen = marked[:: max(1, len(marked) // count)][:count]
    agree = 0
    for drawn, question, mark in chosen:
        inputs = processor(images=drawn.image, text=prompt(question.text), return_tensors="pt")
        with torch.no_grad():
            ids = model.generate(**inputs, max_new_tokens=MAX_NEW_TOKENS, do_sample=False)  # type: ignore[misc]
        said = decode(processor, ids[0, inputs["input_ids"].shape[1] :])
        agree += (said == question.answer) == mark
    return {"questions": len(chosen), "agree": agree}
