"""The card of the recall model: what it was trained on and what it can do, measured, as card.json and README.md.

python -m winnow.learn.recall_card FOLDER --log RUN/log.jsonl --seed 0
"""

from __future__ import annotations

import datetime
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import LlamaForCausalLM

from winnow.bench.recall import Answer, accuracy, measure, perplexity
from winnow.learn import cards
from winnow.learn.markdown import table
from winnow.world.recall import COUNTS, TASKS, VERSION, draw

LENGTHS = (128, 256, 512)
PAIRS = (8, 16, 32)  # at PAIRS_LENGTH
PAIRS_LENGTH = 512


def make(
    folder: str | Path, *, log: str | Path | None = None, seed: int = 0, samples: int = 100, date: str | None = None
) -> dict[str, Any]:
    """Measure the model in `folder`, and write card.json and README.md there.

    Args:
        log: log.jsonl of its training run.
        seed: of that run.
        samples: for each task and length.
        date: of the training; today if none is given.
    """
    folder = Path(folder)
    model = LlamaForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    config = model.config
    asking = [task for task in TASKS if COUNTS[task][1]]
    needles = {length: measure(model, None, "needle", samples, length) for length in LENGTHS}
    card: dict[str, Any] = {
        **cards.weights(model, folder),
        "layers": config.num_hidden_layers,
        "width": config.hidden_size,
        "heads": [config.num_attention_heads, config.num_key_value_heads],
        "recall_version": VERSION,
        "seed": seed,
        "date": date or datetime.date.today().isoformat(),
        "samples": samples,
        "accuracy": {
            task: {
                str(n): _rate(needles[n] if task == "needle" else measure(model, None, task, samples, n))
                for n in LENGTHS
            }
            for task in asking
        },
        "pairs": {
            str(count): _rate(measure(model, None, "pairs", samples, PAIRS_LENGTH, facts=count)) for count in PAIRS
        },
        "needle_by_quarter": _by_quarter(needles[LENGTHS[-1]], LENGTHS[-1]),
        "perplexity": {str(n): round(perplexity(model, None, min(samples, 32), n), 3) for n in LENGTHS},
        "training": cards.training(log, "tokens", TASKS),
    }
    cards.write(card, page(card), folder)
    return card


def _rate(answers: Sequence[Answer]) -> float:
    return round(accuracy(answers), 4)


def _by_quarter(answers: Sequence[Answer], length: int) -> list[float]:
    """Accuracy by the quarter of the context in which the needle lies."""
    quarters: list[list[Answer]] = [[], [], [], []]
    for answer in answers:
        start = draw("needle", answer.seed, length, "test").asked[0].evidence[0][0]
        quarters[4 * start // length].append(answer)
    return [_rate(part) if part else 0.0 for part in quarters]


def page(card: dict[str, Any]) -> str:
    """The card as Markdown."""
    lengths = list(card["perplexity"])
    parts = [
        "# The recall model",
        "Written by `python -m winnow.learn.recall_card`; every number is measured by it and lies in `card.json`.",
        f"A `LlamaForCausalLM` of {card['parameters'] / 1e6:.2f} million parameters ({card['bytes'] / 1e6:.1f} MB in "
        f"bfloat16): {card['layers']} layers of width {card['width']}, {card['heads'][0]} query heads that share "
        f"{card['heads'][1]} heads of keys and values, rotary positions. It is a measuring instrument for KV caches: "
        "it reads the texts of `winnow.world.recall` and answers their questions.",
        "```python\nfrom winnow.bench.recall import accuracy, measure\nfrom winnow.reference import text\n\n"
        'model, tokenizer = text.load()\nprint(accuracy(measure(model, "full", "needle", n=64, length=512)))\n```',
        "## What it can do",
        f"Share of questions answered right in all tokens, greedily, on {card['samples']} texts of the split `test` "
        "for each cell, by tokens of the context. The context is read before the question comes.",
        table(
            ["task", *lengths],
            [[task, *(f"{row[n]:.3f}" for n in lengths)] for task, row in card["accuracy"].items()],
        ),
        f"Contexts hold {COUNTS['needle'][0]} fact (needle), {COUNTS['pairs'][0]} pairs, {COUNTS['several'][0]} facts "
        f"with {COUNTS['several'][1]} questions one after the other (several), {COUNTS['copy'][0]} spans (copy); the "
        "rest is filler. Pairs by their number, at "
        f"{PAIRS_LENGTH} tokens: "
        + ", ".join(f"{n}: {rate:.3f}" for n, rate in card["pairs"].items())
        + ". Needles at "
        f"{lengths[-1]} tokens by the quarter in which they lie: "
        + ", ".join(f"{rate:.3f}" for rate in card["needle_by_quarter"])
        + ".",
        "Perplexity of the last quarter of filler texts, by length: "
        + ", ".join(f"{n}: {value:.2f}" for n, value in card["perplexity"].items())
        + ". Who knows the language but has not read the text gets 8.0; who knows also what the text favours, 4.65. "
        "A model near 8 or above does not use the text for it, and its perplexity says little of a cache.",
        "## How it was made",
        _made(card),
        "## What it cannot do",
        "It knows 300 words and no language. Its look-ups sit in few heads, most of which were set by hand before the "
        "training (`winnow.reference.starts`), and texts are regular; so a method's loss here says whether it keeps "
        "what is asked for, not what it costs on a large model. It was trained on contexts of at most 512 tokens, and "
        "so briefly that it falls short in the cells of the table that are well under 1; compare methods with its own "
        "full cache. It was trained on whole caches only. One run is one seed.",
    ]
    return "\n\n".join(parts) + "\n"


def _made(card: dict[str, Any]) -> str:
    said = (
        f"`make recall`: texts drawn from seed {card['seed']} of the split `train`, version {card['recall_version']} "
        f"of the tasks, each read once; {card['date']}."
    )
    training = card["training"]
    if training is None:
        return said
    return (
        f"{said} {training['tokens'] / 1e6:.1f} million tokens in {training['cpu_minutes']:.0f} minutes of one CPU "
        "thread. Stages are named by the longest context; running accuracies where each was last logged:\n\n"
        + cards.stage_table(training, TASKS[:-1])
    )


if __name__ == "__main__":
    cards.main(make, __doc__, "samples", 100)
