"""The card of a reference model: what it was trained on and what it can do, measured, as card.json and as a page.

python -m winnow.learn.card FOLDER --log RUN/log.jsonl --page docs/reference-model.md
"""

from __future__ import annotations

import argparse
import json
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoProcessor, LlavaForConditionalGeneration, LlavaProcessor

from winnow.learn import card_page, evaluate
from winnow.learn.evaluate import Sample, answers_right, by_type
from winnow.learn.progress import read
from winnow.reference import MAX_NEW_TOKENS, decode, prompt
from winnow.world import HELD_OUT, TYPES, VERSION, evidence_mask

SHARES = (0.5, 0.25, 0.125, 0.05)
DETAILS = 60  # questions per type for the erasure table, and scenes' worth for the depth of use
NOT_RUN = (
    "spread over three training seeds",
    "a twin trained without token dropout",
    "a tower trained without the [CLS] objective",
    "the preset base",
)


def make(
    folder: str | Path,
    *,
    log: str | Path | None = None,
    page: str | Path | None = None,
    per_type: int = 200,
    seed: int = 0,
    machine: str = "2 CPU cores, one thread each",
    processes: int = 2,
    note: str = "",
) -> dict[str, Any]:
    """Measure the model in `folder` and write card.json there, and a readable page if asked for.

    `log` is the log.jsonl of its training run, `note` what else must be said about that. Nothing about the model is
    taken on trust but the fields of "training".
    """
    folder = Path(folder)
    model = LlavaForConditionalGeneration.from_pretrained(folder, dtype=torch.float32).eval()
    processor = AutoProcessor.from_pretrained(folder)
    size = model.config.vision_config.image_size
    sample = evaluate.draw_sample(per_type, size)
    tokens = evaluate.visual_tokens(model, [drawn.pixels for drawn in sample.scenes])
    full = answers_right(model, tokens, sample.questions)
    card: dict[str, Any] = {
        "parameters": sum(p.numel() for p in model.parameters()),
        "bytes": sum(p.stat().st_size for p in folder.glob("*.safetensors")),
        "image_size": size,
        "visual_tokens": tokens.shape[1],
        "layers": model.config.text_config.num_hidden_layers,
        "width": model.config.text_config.hidden_size,
        "world_version": VERSION,
        "seed": seed,
        "questions": len(sample.flat),
        "scenes": len(sample.scenes),
        **_scores(sample, full, answers_right(model, tokens[:, :0], sample.questions)),
        "depth_of_use": _depth(model, sample, tokens, per_type),
        "dropping": _dropping(model, sample, tokens),
        "reading_by_labels": _by_labels(sample, full),
        "erasure": _erasure(model, min(per_type, DETAILS), size),
        "heldout_glyphs": _held_out(model, min(per_type, 100), size),
        "generate_check": generate_check(model, processor, sample, full),
        "training": _training(Path(log), machine, processes) | {"note": note} if log else None,
        "not_run": list(NOT_RUN),
    }
    (folder / "card.json").write_text(json.dumps(card, indent=1) + "\n")
    if page is not None:
        Path(page).write_text(card_page.page(card))
    return card


def _target(accuracy: float, blind: float) -> float:
    """The part of what pictures could add that they do add: (accuracy − blind) / (1 − blind)."""
    return round((accuracy - blind) / (1 - blind), 4) if blind < 1 else 0.0


def _scores(sample: Sample, full: list[list[bool]], none: list[list[bool]]) -> dict[str, Any]:
    """Accuracies; "blind" is the larger of the model's without visual tokens and of the best constant answer."""
    accuracy, unseen, constant = by_type(sample, full), by_type(sample, none), evaluate.majority(sample)
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


def _depth(model: LlavaForConditionalGeneration, sample: Sample, tokens: Tensor, per_type: int) -> dict[str, Any]:
    """Accuracy when all visual tokens leave before layer l, on a part of the sample; the last l is no removal."""
    part = max(1, len(sample.scenes) * min(per_type, DETAILS) // per_type)
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


def _dropping(model: LlavaForConditionalGeneration, sample: Sample, tokens: Tensor) -> dict[str, Any]:
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


def _by_labels(sample: Sample, full: list[list[bool]]) -> dict[str, Any]:
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


def _erasure(model: LlavaForConditionalGeneration, per_type: int, size: int) -> dict[str, Any]:
    """Accuracy by type with the evidence painted over, and with the same area elsewhere painted over."""
    drawn = evaluate.draw_sample(per_type, size, seed=1 << 20)
    kept = [(s, tuple(q for q in qs if q.evidence)) for s, qs in zip(drawn.scenes, drawn.questions, strict=True)]
    sample = Sample(tuple(s for s, q in kept if q), tuple(q for _, q in kept if q))
    rng = random.Random(0)
    accuracies = {
        "intact": by_type(sample, evaluate.one_each(model, sample, lambda s, q: s.pixels)),
        "evidence_erased": by_type(
            sample, evaluate.one_each(model, sample, lambda s, q: evaluate.erased(s, q, False, rng))
        ),
        "elsewhere_erased": by_type(
            sample, evaluate.one_each(model, sample, lambda s, q: evaluate.erased(s, q, True, rng))
        ),
    }
    return {
        "questions": len(sample.flat),
        **{kind: {name: round(a[kind], 4) for name, a in accuracies.items()} for kind in (*TYPES, "overall")},
    }


def _held_out(model: LlavaForConditionalGeneration, per_type: int, size: int) -> dict[str, Any]:
    """Questions that name a glyph which no training question named; it was seen in pretraining and alignment only."""
    types = ("presence", "count", "relation", "place", "reading", "referring", "comparison")
    sample = evaluate.draw_sample(per_type, size, split="heldout_glyphs", types=types)
    tokens = evaluate.visual_tokens(model, [s.pixels for s in sample.scenes])
    right = by_type(sample, answers_right(model, tokens, sample.questions))
    blind = by_type(sample, answers_right(model, tokens[:, :0], sample.questions))
    constant = evaluate.majority(sample)
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


def _training(log: Path, machine: str, processes: int) -> dict[str, Any]:
    """Stages, steps, pictures and CPU minutes from the log of a run (resumed runs restart their clock)."""
    stages: dict[str, dict[str, Any]] = {}
    seconds = last = 0.0
    for row in read(log):
        spent = row["cpu_seconds"] - (last if row["cpu_seconds"] >= last else 0.0)
        last = row["cpu_seconds"]
        seconds += spent
        stage = stages.setdefault(row["stage"], {"cpu_minutes": 0.0})
        stage["cpu_minutes"] += spent * processes / 60
        stage["steps"], stage["images"] = row["step"], row["images"]
    before = 0
    for stage in stages.values():
        stage["images"], before = stage["images"] - before, stage["images"]
        stage["cpu_minutes"] = round(stage["cpu_minutes"], 1)
    return {
        "machine": machine,
        "processes": processes,
        "cpu_minutes": round(seconds * processes / 60, 1),
        "images": before,
        "steps": sum(stage["steps"] for stage in stages.values()),
        "token_dropout": "mild: the last stage keeps all tokens in 65 % of its steps, 15 to 75 % in the rest",
        "stages": stages,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("folder")
    parser.add_argument("--log")
    parser.add_argument("--page")
    parser.add_argument("--note", default="", help="a sentence about the training")
    parser.add_argument("--per-type", type=int, default=200)
    arguments = parser.parse_args()
    make(arguments.folder, log=arguments.log, page=arguments.page, per_type=arguments.per_type, note=arguments.note)


if __name__ == "__main__":
    main()
