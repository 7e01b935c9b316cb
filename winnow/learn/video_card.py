"""The card of the video reference model: what it was trained on and can do, measured, as card.json and README.md.

python -m winnow.learn.video_card FOLDER --log RUN/log.jsonl --seed 0
"""

from __future__ import annotations

import datetime
from pathlib import Path
from typing import Any

from winnow.learn import cards
from winnow.learn.clip_evaluate import (
    CHOICES,
    CONDITIONS,
    Sample,
    by_type,
    draw_sample,
    majority,
    relation_gap,
    under,
    with_tokens,
)
from winnow.learn.markdown import table
from winnow.reference import video
from winnow.world.clips import LEVELS, TYPES, VERSION, ClipSpec

SHARES = (0.5, 0.25, 0.125)
LONG = (16, 32, 64)  # frames
LEARNED, BEYOND = 0.75, 0.15  # a type is learned from this accuracy on, and so far above what is guessed
NAMES = (*TYPES, "perception", "event", "relation", "overall")
CHECKED = 40  # questions that are also asked through `generate`


def make(
    folder: str | Path, *, log: str | Path | None = None, seed: int = 0, per_type: int = 150, date: str | None = None
) -> dict[str, Any]:
    """Measure the model in `folder`, and write card.json and README.md there.

    Args:
        log: log.jsonl of its training run.
        seed: of that run.
        per_type: questions of each type.
        date: of the training; today if none is given.
    """
    folder = Path(folder)
    model, processor = video.load(folder)
    sample = draw_sample(per_type)
    marks = {condition: under(model, sample, condition) for condition in CONDITIONS}
    accuracy = {condition: _rounded(by_type(sample, marks[condition])) for condition in CONDITIONS}
    card: dict[str, Any] = {
        **cards.weights(model, folder),
        "clips_version": VERSION,
        "seed": seed,
        "date": date or datetime.date.today().isoformat(),
        "questions": {"per_type": per_type, "clips": len(sample.clips)},
        "accuracy": accuracy,
        "majority": _rounded(majority(sample)),
        "learned": [kind for kind in TYPES if _learned(accuracy, kind)],
        "averaged_relation_gap": round(relation_gap(accuracy["full"], accuracy["averaged"]), 4),
        "tokens": {
            str(share): {
                choice: _rounded(by_type(sample, with_tokens(model, sample, choice, share))) for choice in CHOICES
            }
            for share in SHARES
        },
        "needle_in_long_clips": {str(frames): _needle(model, frames, min(per_type, 60)) for frames in LONG},
        "through_generate": _through_generate(model, processor, sample, marks["full"]),
        "training": cards.training(log, "clips", TYPES),
    }
    cards.write(card, page(card), folder)
    return card


def _rounded(values: dict[str, float]) -> dict[str, float]:
    return {name: round(value, 4) for name, value in values.items()}


def _learned(accuracy: dict[str, dict[str, float]], kind: str) -> bool:
    guessed = max(accuracy["blind"][kind], accuracy["single-frame"][kind] if LEVELS[kind] != "perception" else 0.0)
    return accuracy["full"][kind] >= LEARNED and accuracy["full"][kind] >= guessed + BEYOND


def _needle(model: Any, frames: int, count: int) -> float:
    sample = draw_sample(count, frames=frames, types=("needle",), spec=ClipSpec(needle=True))
    return round(by_type(sample, under(model, sample, "full"))["needle"], 4)


def _through_generate(model: Any, processor: video.ClipProcessor, sample: Sample, marks: list[list[bool]]) -> float:
    """The share of questions that `generate` answers right exactly where the packed pass does."""
    flat = [mark for row in marks for mark in row]
    pairs = list(zip(sample.flat, flat, strict=True))
    asked = pairs[:: max(1, len(pairs) // CHECKED)]
    same = [
        (video.answer(model, processor, drawn.pixels, question.text) == question.answer) == mark
        for (drawn, question), mark in asked
    ]
    return round(sum(same) / len(same), 4)


def page(card: dict[str, Any]) -> str:
    """The card as Markdown."""
    accuracy, asked = card["accuracy"], card["questions"]
    weak = [kind for kind in TYPES if kind not in card["learned"]]
    parts = [
        "# The video reference model",
        "Written by `python -m winnow.learn.video_card`; every number is measured by it and lies in `card.json`.",
        f"A `Qwen2_5_VLForConditionalGeneration` of {card['parameters'] / 1e6:.2f} million parameters "
        f"({card['bytes'] / 1e6:.1f} MB in bfloat16). A token is 28 × 28 pixels of one second, which is two frames; "
        "positions are those of Qwen2.5-VL (time, row, column). It is a measuring instrument for the compression of "
        "videos: it understands the clips of `winnow.world.clips` and their questions, nothing else.",
        "```python\nfrom winnow.reference import video\nfrom winnow.world.clips import clip\n\n"
        "model, processor = video.load()\ndrawn = clip(0, split='test')\n"
        "print(video.answer(model, processor, drawn.pixels, drawn.questions[0].text))\n```",
        "## What it can do",
        f"Share of questions answered right in all tokens, greedily, on {asked['per_type']} questions of each type "
        f"about {asked['clips']} clips of the split `test` (16 frames of 84 pixels, 72 tokens). `blind`: no tokens; "
        "`shuffled`: frames in random order; `single-frame`: the middle one, standing still; `averaged`: the mean of "
        "all, standing still; `most frequent`: the best constant answer of the type.",
        table(
            ["type", *CONDITIONS, "most frequent"],
            [
                [name, *(f"{accuracy[c][name]:.3f}" for c in CONDITIONS), cards.cell(card["majority"].get(name))]
                for name in NAMES
            ],
        ),
        _not_learned(weak),
        "Levels are those of the protocol: perception (presence, needle), event (motion, camera, change, count, cuts, "
        f"when), relation (color, order, cause). Averaging all frames has a relation gap of "
        f"{card['averaged_relation_gap']:.2f} (share of perception kept less share of relations kept). "
        f"`generate` and the packed pass agree on {card['through_generate']:.0%} of the questions that were asked "
        "both ways.",
        "A word that is shown for one second, by frames of the clip: "
        + ", ".join(f"{n}: {rate:.3f}" for n, rate in card["needle_in_long_clips"].items())
        + ". It was trained on 16 frames.",
        "## With fewer tokens",
        "Accuracy over all questions, and of the levels. `random` tokens; `seconds`: whole seconds, evenly spaced; "
        "`evidence`: the question's evidence first, then other things. At their own positions.",
        table(
            ["tokens", "choice", "overall", "perception", "event", "relation"],
            [
                [
                    f"{float(share):.1%}",
                    choice,
                    *(f"{row[n]:.3f}" for n in ("overall", "perception", "event", "relation")),
                ]
                for share, choices in card["tokens"].items()
                for choice, row in choices.items()
            ],
        ),
        "## How it was made",
        _made(card),
        "## What it cannot do",
        "It knows 32 glyphs, 6 shapes, 16 words and no language. Things move in rows or columns and never cover each "
        "other, and events begin at whole seconds. Its tower saw each second by itself; what happens over time is "
        "found by its language model. It was trained briefly: compare methods with its own full clip, and only on the "
        "types that it has learned. One run is one seed.",
    ]
    return "\n\n".join(parts) + "\n"


def _not_learned(weak: list[str]) -> str:
    rule = f"at least {LEARNED} and {BEYOND} above blind and, beyond perception, above a single frame"
    if not weak:
        return f"All types are learned: {rule}."
    return f"**Not learned: {', '.join(weak)}** (learned is {rule}). Do not compare methods on these."


def _made(card: dict[str, Any]) -> str:
    said = (
        f"`make video`: clips drawn from seed {card['seed']} of the split `train`, version {card['clips_version']} of "
        f"the clips, each seen once; {card['date']}. The language model began as that of the reference model `small`."
    )
    training = card["training"]
    if training is None:
        return said
    said += f" {card['notes']}" if "notes" in card else ""
    return (
        f"{said} {training['clips'] / 1e3:.0f} thousand clips in {training['cpu_minutes']:.0f} minutes of one CPU "
        "thread. Running accuracies where each stage was last logged:\n\n" + cards.stage_table(training, TYPES)
    )


if __name__ == "__main__":
    cards.main(make, __doc__, "per_type", 150)
