"""The card of a reference model: what it was trained on and what it can do, measured, as card.json and as a page.

python -m winnow.learn.card FOLDER --log RUN/log.jsonl --page docs/reference-model.md [--run RUN]… [--dense RUN]
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from winnow.learn import card_page, cards, controls, evaluate, measures
from winnow.learn.evaluate import answers_right
from winnow.learn.progress import read
from winnow.models.load import load
from winnow.models.quiet import quiet
from winnow.reference.presets import preset as preset_of
from winnow.world import VERSION

DETAILS = 60  # questions per type for the erasure table, and scenes' worth for the depth of use


def make(
    folder: str | Path,
    *,
    preset: str = "small",
    log: str | Path | None = None,
    page: str | Path | None = None,
    per_type: int = 200,
    seed: int = 0,
    machine: str = "2 CPU cores, one thread each",
    processes: int = 2,
    note: str = "",
    runs: Sequence[Path] = (),
    dense: Path | None = None,
    stores: tuple[Path, Path] | None = None,
) -> dict[str, Any]:
    """Measure the model in `folder` and write card.json there, and a readable page if asked for.

    `log` is the log.jsonl of its training run, `note` what else must be said about that. Nothing about the model is
    copied, except "training". What `runs`, `dense` and `stores` are is said by `controls.measure`.
    """
    folder = Path(folder)
    model, processor = load(folder, device="cpu", dtype="float32")
    size = model.config.vision_config.image_size
    sample = evaluate.draw_sample(per_type, size)
    tokens = evaluate.visual_tokens(model, [drawn.pixels for drawn in sample.scenes])
    full = answers_right(model, tokens, sample.questions)
    none = answers_right(model, tokens[:, :0], sample.questions)
    part = min(per_type, DETAILS) / per_type
    compared = controls.measure(
        model,
        processor,
        sample,
        tokens,
        part,
        sizes=preset_of(preset),
        log=None if log is None else Path(log),
        runs=runs,
        dense=dense,
        stores=stores,
    )
    card: dict[str, Any] = {
        "preset": preset,
        **cards.weights(model, folder),
        "image_size": size,
        "visual_tokens": tokens.shape[1],
        "layers": model.config.text_config.num_hidden_layers,
        "width": model.config.text_config.hidden_size,
        "world_version": VERSION,
        "seed": seed,
        "questions": len(sample.flat),
        "scenes": len(sample.scenes),
        **measures.scores(sample, full, none),
        "depth_of_use": measures.depth(model, sample, tokens, part),
        "dropping": measures.dropping(model, sample, tokens),
        "reading_by_labels": measures.by_labels(sample, full),
        "erasure": measures.erasure(model, min(per_type, DETAILS), size),
        "heldout_glyphs": measures.held_out(model, min(per_type, 100), size),
        "generate_check": measures.generate_check(model, processor, sample, full),
        "training": _training(Path(log), machine, processes) | {"note": note} if log else None,
        "controls": compared,
        "not_run": _not_run(compared),
    }
    (folder / "card.json").write_text(json.dumps(card, indent=1) + "\n")
    if page is not None:
        Path(page).write_text(card_page.page(card))
    return card


def _not_run(compared: dict[str, Any]) -> list[str]:
    """What a card should hold and this one does not."""
    runs = compared.get("runs", [])
    seeds = {run["seed"] for run in runs if run["dropout"]}
    missing = {
        f"spread over three training seeds (here: {len(seeds) or 1})": len(seeds) < 3,
        "a twin trained without token dropout": all(run["dropout"] for run in runs),
        "methods on that twin": "methods" not in compared,
        "a tower trained without the [CLS] objective": "towers" not in compared,
        "the preset base": True,
    }
    return [what for what, is_missing in missing.items() if is_missing]


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
    parser.add_argument("--preset", default="small")
    parser.add_argument("--log")
    parser.add_argument("--page")
    parser.add_argument("--note", default="", help="a sentence about the training")
    parser.add_argument("--per-type", type=int, default=200)
    parser.add_argument("--seed", type=int, default=0, help="the seed it was trained with")
    parser.add_argument(
        "--run", dest="runs", type=Path, action="append", default=[], help="to compare; may be repeated"
    )
    parser.add_argument("--dense", type=Path, help="a run without the [CLS] objective")
    parser.add_argument("--stores", type=Path, nargs=2, help="`winnow bench` on this model, and on the twin")
    quiet()
    make(**vars(parser.parse_args()))


if __name__ == "__main__":
    main()
