"""Measure every method that looks across the frames of a video on winnow's clips, and write its tables.

    python tools/clips.py measure [--processes 2] [--questions 210]   docs/clips.json, and the tables of docs/clips.md
    python tools/clips.py write                                       the tables, from docs/clips.json

On the video reference model, and on the types of questions that it has learned. A run that was stopped goes on where
it was (`out/clips.sqlite`).
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")
ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import winnow  # noqa: E402
from winnow.bench.intervals import paired, rate  # noqa: E402
from winnow.bench.processes import Sweep, run_all  # noqa: E402
from winnow.bench.schema import Answer  # noqa: E402
from winnow.bench.store import Store  # noqa: E402
from winnow.core.plan import Plan  # noqa: E402
from winnow.core.registry import method_class, token_methods  # noqa: E402
from winnow.learn.connectors import trainable  # noqa: E402
from winnow.learn.markdown import table  # noqa: E402
from winnow.models.quiet import quiet  # noqa: E402
from winnow.reference import video  # noqa: E402
from winnow.world.clips import LEVELS  # noqa: E402

FIGURES, PAGE = ROOT / "docs" / "clips.json", ROOT / "docs" / "clips.md"
STORE = ROOT / "out" / "clips.sqlite"
BEGIN, END = "<!-- methods:begin -->", "<!-- methods:end -->"
FRAMES = 16
BUDGETS = ("50%", "25%", "12.5%")
BASELINES = ("random", "uniform", "downsample", "ceiling")
SAMPLED = "seconds-M"  # fewer frames, whole and evenly spread
# Of methods without a budget, settings that leave about as many tokens; of one that chooses frames ahead, what it does
# behind the projector; of one that also reads less while decoding, the part that is done by then.
SETTINGS = {
    "dycoke": {"50%": "dycoke:k=0.67,p=0", "25%": "dycoke:k=1,p=0"},
    "kffocus": {budget: f"kffocus:sampling=false,keep={budget}" for budget in BUDGETS},
    "prunevid": {budget: f"prunevid:alpha={alpha}" for budget, alpha in zip(BUDGETS, (1.0, 0.5, 0.25), strict=True)},
    "visual-context-window-extension": {
        "50%": "visual-context-window-extension:window=none,strides=[1.0,2.0,2.0,2.0]",
        "25%": "visual-context-window-extension:window=none,strides=[2.0,3.0,3.0,3.0]",
        "12.5%": "visual-context-window-extension:window=none,strides=[3.0]",
    },
}
LEVEL_NAMES = ("perception", "event", "relation")


def across_frames() -> tuple[str, ...]:
    """The slugs of the methods of videos, in order: those whose class says that they look across frames.

    Learned connectors have a page of their own, docs/learned-video.md, and the clips have no sound.
    """
    found = []
    for entry in token_methods():
        own = entry.module.startswith("winnow.methods.") and entry.slug not in trainable() and not entry.of_sounds
        if own and method_class(entry.slug).across_frames:
            found.append(entry.slug)
    return tuple(found)


def asked_for() -> tuple[str, ...]:
    """What is measured: slugs, to which budgets apply, and plans."""
    return tuple(
        plan for slug in across_frames() for plan in (SETTINGS[slug].values() if slug in SETTINGS else (slug,))
    )


def kinds(plans: Iterable[str]) -> dict[str, dict[str, bool]]:
    """Of each plan, whether it reads the text, and whether what stays of a frame depends on earlier ones alone.

    Both are derived: a bound plan knows whether a signal that its steps read depends on the text, and a method that
    remembers what came before (`streaming`) is told of no later frame.
    """
    model, processor = video.load()
    found = {}
    with winnow.compress(model, Plan(()), processor=processor) as handle:
        for key in plans:
            plan = Plan.of(key)
            bound = handle.bind(plan)
            past = all(method.streaming for method in plan.methods)
            found[key] = {"reads_text": bound.reads_text, "causal": past and not bound.reads_text}
    return found


def measure(processes: int, questions: int) -> dict[str, Any]:
    """All figures, as they stand in docs/clips.json."""
    sweep = Sweep(
        str(STORE), asked_for(), BUDGETS, questions=questions, baselines=BASELINES, clips=FRAMES, threads=1, checked=16
    )  # fmt: skip
    run = run_all(sweep, processes, progress=sys.stderr.isatty(), say=print)
    with Store(STORE) as store:
        cells = [(cell, {a.question: a for a in store.answers(cell.id)}) for cell in store.cells(run)]
        about = store.run(run).settings["task"]
    nominal = {Plan.of(plan).key: (slug, b) for slug, own in SETTINGS.items() for b, plan in own.items()}
    rows = [_figures(*nominal.get(c.plan, (c.label, c.budget)), c.plan, c.status, own, cells) for c, own in cells]
    of_plans = kinds(row["plan"] for row in rows if not row["plan"].startswith("baseline:"))
    return {
        "questions": about["questions"],
        "types": about["types"],
        "version": about["version"],
        "rows": [row | of_plans.get(row["plan"], {}) for row in rows],
    }


def _figures(
    name: str, budget: str, plan: str, status: str, own: dict[str, Answer], cells: Sequence[Any]
) -> dict[str, Any]:
    """One row."""
    by_level: dict[str, list[bool]] = {level: [] for level in LEVEL_NAMES}
    for answer in own.values():
        by_level[LEVELS[answer.type]].append(answer.correct)
    right = [answer.correct for answer in own.values()]
    row: dict[str, Any] = {"name": name, "budget": budget, "plan": plan, "status": status}
    row["right"], row["asked"] = sum(right), len(right)
    row["tokens"] = _mean([a.kept for a in own.values()])
    row["per_layer"] = _mean([a.layer_tokens for a in own.values()])
    row["evidence"] = _mean([a.evidence_recall for a in own.values() if a.evidence_recall is not None])
    row["levels"] = {level: _mean([float(x) for x in found]) for level, found in by_level.items()}
    for against in ("full", SAMPLED):
        others = [a for c, a in cells if c.label == against and (against == "full" or c.budget == budget)]
        if others and own and name != against:
            shared = [q for q in own if q in others[0]]
            gap = paired([others[0][q].correct for q in shared], [own[q].correct for q in shared])
            row[against] = [round(x, 4) for x in (gap.value, gap.low, gap.high)]
    return row


def _mean(values: Sequence[Any]) -> float | None:
    return round(sum(values) / len(values), 4) if values else None


def tables(figures: dict[str, Any]) -> str:
    """The tables of the page."""
    rows = figures["rows"]
    baselines = [row for row in rows if row["plan"].startswith("baseline:")]
    order = ("full", "shuffled", "single-frame", "blind")
    shows = sorted((row for row in baselines if not row["budget"]), key=lambda row: order.index(row["name"]))
    chosen = [row for row in baselines if row["budget"]]
    methods = [row for row in rows if not row["plan"].startswith("baseline:")]
    parts = [
        _asked(figures),
        "What is shown less, and choices of as many tokens that no method makes:",
        _table([*shows, *chosen]),
    ]
    groups = (
        ("Methods that never see the question, nor later frames", lambda row: row["causal"]),
        (
            "Methods that never see the question, and see the whole clip",
            lambda r: not r["causal"] and not r["reads_text"],
        ),
        ("Methods that see the question and the whole clip", lambda row: row["reads_text"]),
    )
    for title, belongs in groups:
        own = sorted(
            (row for row in methods if belongs(row)), key=lambda r: (r["name"], -float(r["budget"].rstrip("%")))
        )
        parts += [f"{title}:", _table(own)]
    return "\n\n".join(parts)


def _asked(figures: dict[str, Any]) -> str:
    types = ", ".join(f"{kind} {count}" for kind, count in figures["types"].items())
    return f"{figures['questions']} questions about clips of {FRAMES} frames, {FRAMES // 2 * 9} tokens: {types}."


def _table(rows: Sequence[dict[str, Any]]) -> str:
    head = ("", "keep", "tokens", "right [95 %]", "against full", "against fewer frames", *LEVEL_NAMES, "evidence")
    lines = []
    for row in rows:
        if not row["asked"] or row["status"] != "ok":
            lines.append([f"`{row['name']}`", row["budget"], *["–"] * (len(head) - 2)])
            continue
        own = rate(row["right"], row["asked"])
        levels = [_number(row["levels"][level]) for level in LEVEL_NAMES]
        lines.append(
            [
                f"`{row['name']}`", row["budget"], f"{row['tokens']:.1f}",
                f"{own.value:.2f} [{own.low:.2f}, {own.high:.2f}]", _gap(row.get("full")), _gap(row.get(SAMPLED)),
                *levels, _number(row["evidence"]),
            ]
        )  # fmt: skip
    return table(head, lines)


def _gap(found: Sequence[float] | None) -> str:
    """A paired difference in percentage points; in bold where its interval leaves out 0."""
    if found is None:
        return ""
    value, low, high = (f"{number:+d}" if number else "0" for number in (round(100 * x) for x in found))
    text = f"{value} [{low}, {high}]"
    return text if found[1] <= 0 <= found[2] else f"**{text}**"


def _number(value: float | None) -> str:
    return "–" if value is None else f"{value:.2f}"


def write() -> None:
    """Put the tables between the marks of the page."""
    before, _, rest = PAGE.read_text(encoding="utf-8").partition(BEGIN)
    _, _, after = rest.partition(END)
    figures = json.loads(FIGURES.read_text(encoding="utf-8"))
    PAGE.write_text(f"{before}{BEGIN}\n{tables(figures)}\n{END}{after}", encoding="utf-8")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("action", choices=("measure", "write"))
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--questions", type=int, default=210)
    given = parser.parse_args()
    if given.action == "measure":
        quiet()
        start = time.perf_counter()
        figures = measure(given.processes, given.questions)
        FIGURES.write_text(json.dumps(figures, indent=1) + "\n", encoding="utf-8")
        print(f"{(time.perf_counter() - start) / 60:.1f} minutes")
    write()
    return 0


if __name__ == "__main__":
    sys.exit(main())
