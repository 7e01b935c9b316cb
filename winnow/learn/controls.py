"""Models trained another way, beside the shipped one: other seeds, without token dropout, without the [CLS] objective.

They answer what else could have made a result: the seed, the dropout that real checkpoints do not have, the objective
that teaches [CLS] to look at things. Their weights are not shipped; `winnow train reference` makes them again.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import LlavaForConditionalGeneration, LlavaProcessor

from winnow.core.errors import WinnowError
from winnow.engine.compress import compress
from winnow.learn.checkpoint import read_checkpoint
from winnow.learn.evaluate import BATCH, Sample, answers_right, by_type, visual_tokens
from winnow.learn.measures import SHARES, depth, dropping, scores
from winnow.learn.progress import read
from winnow.models.load import load
from winnow.reference import prompt
from winnow.reference.build import make_model
from winnow.reference.presets import Preset
from winnow.world import evidence_mask

BRIEF = ("overall", "blind", "target")
METHOD_FIELDS = ("label", "budget", "accuracy", "accuracy_low", "accuracy_high", "tokens_kept")


def of_run(run: Path, sample: Sample, part: float) -> dict[str, Any]:
    """Accuracy, depth of use and the cost of dropping of the model that a training run left.

    `part` is the share of the sample for the depth of use.
    """
    variant = read_checkpoint(run / "checkpoint.pt")["variant"]
    model, _ = load(run / "model", device="cpu", dtype="float32")
    tokens = visual_tokens(model, [drawn.pixels for drawn in sample.scenes])
    found = scores(
        sample,
        answers_right(model, tokens, sample.questions),
        answers_right(model, tokens[:, :0], sample.questions),
    )
    return {
        "seed": variant["seed"],
        "dropout": variant["dropout"],
        **{name: found[name] for name in BRIEF},
        "per_type": {kind: row["accuracy"] for kind, row in found["per_type"].items()},
        "cost_before_layer_2": depth(model, sample, tokens, part)["cost_before_layer_2"],
        "dropping": dropping(model, sample, tokens),
    }


@torch.no_grad()
def kept_by_cls(model: LlavaForConditionalGeneration, processor: LlavaProcessor, sample: Sample, count: int) -> Tensor:
    """Indices [n, count] of the tokens that FasterVLM keeps by the [CLS] attention of this model's tower."""
    out = []
    with compress(model, f"fastervlm:keep={count}", processor=processor) as handle:
        for at in range(0, len(sample.scenes), BATCH):
            scenes, questions = sample.scenes[at : at + BATCH], sample.questions[at : at + BATCH]
            texts = [prompt(asked[0].text) for asked in questions]
            model(**processor(images=[s.image for s in scenes], text=texts, padding=True, return_tensors="pt"))
            ledger = handle.last
            out += [item.kept for item in sorted(ledger.items, key=lambda item: item.row)] if ledger else []
    return torch.stack(out)


def recall(sample: Sample, kept: Tensor, grid: int) -> float:
    """The mean share of the evidence's patches that are among `kept` [n, M], over questions that have evidence."""
    found = []
    for drawn, questions, index in zip(sample.scenes, sample.questions, kept, strict=True):
        for question in questions:
            mask = torch.from_numpy(evidence_mask(question.evidence, drawn.size, grid).reshape(-1))
            if mask.any():
                found.append(float(mask[index].sum() / mask.sum()))
    return sum(found) / len(found)


def towers(
    model: LlavaForConditionalGeneration,
    processor: LlavaProcessor,
    sample: Sample,
    tokens: Tensor,
    sizes: Preset,
    log: Path,
    dense: Path,
) -> dict[str, Any]:
    """What [CLS] attention finds in the shipped tower, in one pretrained on its patches alone, in an untrained one.

    The reader is always the shipped model: "accuracy" is its accuracy on its own tokens, chosen by each tower's [CLS].
    `tokens` [n, V, D] are the sample's, `sizes` those of the shipped model and `log` its training log; `dense` is the
    run without the [CLS] objective.
    """
    if read_checkpoint(dense / "checkpoint.pt")["variant"]["cls_objective"]:
        raise WinnowError(f"{dense} is not a control: train it with --no-cls-objective")
    visual = tokens.shape[1]
    grid = round(visual**0.5)
    generator = torch.Generator().manual_seed(0)
    noise = torch.rand(len(tokens), visual, generator=generator)
    choosers = {
        "shipped": model,
        "dense heads only": load(dense / "model", device="cpu", dtype="float32")[0],
        "untrained": make_model(sizes).eval(),
    }
    out: dict[str, Any] = {
        "questions": len(sample.flat),
        "named": {"shipped": _named(log), "dense heads only": _named(dense / "log.jsonl")},
        "recall": {name: {} for name in (*choosers, "random")},
        "accuracy": {name: {} for name in (*choosers, "random")},
    }
    for share in SHARES:
        count = max(1, round(share * visual))
        kept = {name: kept_by_cls(chooser, processor, sample, count) for name, chooser in choosers.items()}
        kept["random"] = noise.topk(count, -1).indices.sort(-1).values
        for name, index in kept.items():
            right = answers_right(model, tokens, sample.questions, keep=index)
            out["recall"][name][str(share)] = round(recall(sample, index, grid), 4)
            out["accuracy"][name][str(share)] = round(by_type(sample, right)["overall"], 4)
    return out


def _named(log: Path) -> dict[str, float]:
    """How well the patches were named at the end of the tower's pretraining: running accuracies of its last line."""
    last = [row for row in read(log) if row["stage"] == "tower-full"][-1]
    return {name: last[name] for name in ("patch", "word", "tens", "color")}


def methods(store: Path, twin: Path) -> dict[str, Any]:
    """Methods on the shipped model and on the twin, from two stores of `winnow bench` with the same questions."""
    from winnow.bench.report import answered
    from winnow.bench.report_data import reports
    from winnow.bench.store import Store

    tables, questions = [], []
    for path in (store, twin):
        with Store(path) as opened:
            report = reports(opened)[-1]
            questions.append(sorted(report.questions))
            tables.append(answered(report, METHOD_FIELDS))
    if questions[0] != questions[1]:
        raise WinnowError(f"{store} and {twin} hold answers to different questions; run `winnow bench` alike for both")
    return {"questions": len(questions[0]), "shipped": tables[0], "without_dropout": tables[1]}


def measure(
    model: LlavaForConditionalGeneration,
    processor: LlavaProcessor,
    sample: Sample,
    tokens: Tensor,
    part: float,
    *,
    sizes: Preset,
    log: Path | None,
    runs: Sequence[Path] = (),
    dense: Path | None = None,
    stores: tuple[Path, Path] | None = None,
) -> dict[str, Any]:
    """The parts of the card that compare; those whose runs are not given are left out."""
    out: dict[str, Any] = {}
    if runs:
        out["runs"] = [of_run(run, sample, part) for run in runs]
    if dense is not None and log is not None:
        out["towers"] = towers(model, processor, sample, tokens, sizes, log, dense)
    if stores is not None:
        out["methods"] = methods(*stores)
    return out
