"""What the report says in words: definitions, explanations, and the notes that follow from a run's own numbers."""

from __future__ import annotations

from winnow.bench.report_data import NATIVE, Report
from winnow.bench.report_table import FEW

TOKENS = "prompt tokens per LM layer (mean)"

INTERVALS = (
    "Further left is cheaper, higher is better. Bars and bands are 95 % intervals; where they overlap, this run does "
    "not tell two curves apart. Points are moved sideways by a few pixels so that their bars can be seen."
)
OVERLAYS = (
    "Kept tokens are clear inside a yellow line, dropped ones grey and dim; the evidence of the question is outlined "
    "in pink. Tokens that were merged are half clear, and lines lead from each to the one that stands for it."
)
HEAT = (
    "Right answers in %, and in colour the difference from the full model on the same type: orange is worse, blue is "
    f"better. Pale figures rest on fewer than {FEW} questions. With so many cells, some differ by chance."
)

BASELINES = {
    "full": "the model without compression",
    "random-M": "M tokens drawn at random",
    "uniform-M": "M tokens evenly spread over the picture",
    "seconds-M": "M tokens of whole frames, evenly spread over the clip",
    "blind": "a grey clip: what can be guessed",
    "shuffled": "the frames in random order",
    "single-frame": "the middle frame, standing still",
    "downsample-M": "the grid of tokens averaged down to at most M",
    "native-M": "the model given M tokens, with nothing to select: the limit of speed",
    "ceiling": "the evidence, then other things in the picture: what a method that knew where to look could keep",
    "oracle": "the evidence and nothing else; a diagnostic, since it also takes the distractors away",
}

DEFINITIONS = {
    "Right answers": (
        "are those equal to the truth, apart from case and outer punctuation. Intervals are at 95 %: Wilson's for a "
        "share, paired ones for comparisons with the full model on the same questions."
    ),
    "Layer-averaged tokens": (
        "are the prompt tokens, text included, that a layer of the language model reads while it takes in the prompt,"
        " averaged over its layers: a method that cuts halfway down pays for the layers above the cut, and stands "
        "further right than one that cuts at the entrance."
    ),
    "Evidence recall": (
        "is the share of the tokens on a question's evidence (the parts of the picture that the answer depends on) "
        "that a layer of the language model reads, averaged over its layers; for a method that acts before the model, "
        "the share that it keeps. A token that was merged into another is not read."
    ),
    "Efficiency": (
        "is (t_full − t_method) / (t_full − t_native-M), to the first token: the time that a method saves, over the "
        "time that the same model saves when it is simply given M tokens. At 100 % the method itself costs nothing; "
        "below 0 it is slower than no compression."
    ),
    "FLOPs": "are those of the language model's prefill, analytic, with full n² attention.",
}


def baselines(report: Report) -> list[tuple[str, str]]:
    """The baselines of a run, each with what it is."""
    labels = {row.cell.label for row in report.rows if row.cell.kind == "baseline"}
    return [(name, text) for name, text in BASELINES.items() if labels & {name, name.removesuffix("-M")}]


def notes(report: Report) -> list[str]:
    """What must be known before anything is concluded from this run; true of its numbers, not of all runs."""
    rows = [row for row in report.rows if row.usable]
    found = [
        "This page ranks nothing. One run with one seed and one model does not settle which method is better, and of "
        f"{len(rows)} cells some differ by chance: each interval is for its own cell alone."
    ]
    if len(report.questions) < 200:
        found.append(f"{len(report.questions)} questions are few: mind the width of the intervals.")
    broken = [row.name for row in report.rows if row.cell.status == "mismatch"]
    if broken:
        found.append(f"Left out, since the sweep's answers were not those of model.generate: {', '.join(broken)}.")
    failed = sum(n for row in report.rows for status, n in row.odd.items() if status.startswith("error:"))
    if failed:
        found.append(f"{failed} answers ended in an error; they are in no figure.")
    odd = sum(n for row in report.rows for status, n in row.odd.items() if not status.startswith("error:"))
    if odd:
        found.append(f"{odd} answers were empty, cut off, or a refusal; they count as wrong.")
    if report.gate:
        found.append(f"No speed-up is shown: {report.gate}.")
    elif report.cases and not any(row.cell.label == NATIVE for row in report.rows):
        found.append("No efficiency is shown: native-M was not timed.")
    if "world" in str(report.run.settings.get("task", "")):
        found.append(
            "The questions are about drawn scenes. They say which tokens a method finds, not how well a large model "
            "understands photographs."
        )
    return found
