"""Measure what the methods of the KV cache keep of long texts, and write the page of it.

    python tools/cache.py [--processes 2] [--questions 32]   docs/cache.md

Every method at every budget on the reference text model: accuracy on held-out texts of 512 tokens, with the question
known when the cache is cut and not, and bytes of the cache beside the plain ones.
"""

from __future__ import annotations

import argparse
import os
import sys
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")
ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import torch  # noqa: E402

import winnow  # noqa: E402
from winnow.bench.intervals import paired  # noqa: E402
from winnow.bench.recall import FULL, measure  # noqa: E402
from winnow.core.errors import WinnowError  # noqa: E402
from winnow.core.method import Method  # noqa: E402
from winnow.core.plan import Plan  # noqa: E402
from winnow.core.registry import built_in, method_class  # noqa: E402
from winnow.learn.markdown import table  # noqa: E402
from winnow.reference import text  # noqa: E402
from winnow.world.recall import draw  # noqa: E402

TARGET = ROOT / "docs" / "cache.md"
LENGTH = 512
FIRST = 1000  # the first text: those before were looked at while the model was trained
BUDGETS = ("50%", "25%", "12.5%", "5%")
CELLS = (("needle", True), ("pairs", True), ("needle", False), ("pairs", False))
# Settings that fit texts of this length, where the defaults are those of the papers' thousands of tokens.
FITTED = {
    "adakv": {"base": "snapkv"},
    "compresskv": {"window": 8, "floor": 16},
    "ems": {"window": 8, "kernel": 1},
    "pyramidkv": {"window": 8},
    "snapkv": {"window": 8},
}
HEADS = ("method", "budget", "needle, question known", "pairs, question known", "needle, not known", "pairs, not known",
         "bytes")  # fmt: skip
HEAD = f"""# What is left of long texts

Every method of the KV cache on the reference text model (`winnow/reference/recall`), on held-out texts of {LENGTH}
tokens: a *needle* in filler, and one of 24 *pairs* of names and values. **Question known:** text and question are read
together, and the cache is cut behind them, so a method can keep what the question needs. **Not known:** the text is
read and cut alone, and the question comes later, on what is left. The two must not be mixed: most scores are the
attention of the last tokens.

A budget is slots of a head, a share of what was read; a later turn adds its share. *Bytes* are of the cache behind the
text, as shares of the plain one. A figure is the share of right answers; in bold where the paired 95 % interval of its
difference to the full cache includes 0. Methods have their default settings, but for windows that fit texts of this
length ({", ".join(f"`{slug}:" + ",".join(f"{k}={v}" for k, v in own.items()) + "`" for slug, own in FITTED.items())}).
The first word of an answer is said by the forward that reads the question, whose layers are cut behind it: the answer
to a pair is one word, so that with the question known only a method that cuts before a layer attends (ZipVL) can lose
it.
RazorAttention was calibrated on the model; CompressKV was not, so all its heads vote. The model is small and its words
are few: what fails here says where not to take a claim for granted. `make cache-table` remakes this page.
"""


@dataclass(frozen=True)
class Row:
    """A plan's line: the right answers of each cell, and the bytes of its cache as a share of the plain one's."""

    slug: str
    budget: str
    plan: str
    right: tuple[tuple[bool, ...], ...]
    bytes: float


def plans() -> list[tuple[str, str, str]]:
    """(slug, budget, plan) of every row; a codec has no budget."""
    found = [(FULL, "", FULL)]
    model = text.load()[0]
    for slug, entry in sorted(built_in().items()):
        if not entry.of_cache or "generator" in entry.stages:
            continue
        kind = method_class(slug)
        method = kind.configured(**FITTED.get(slug, {}))
        if slug == "razorattention":
            method = winnow.calibrate(model, Plan((method,))).methods[0]
        if not kind.takes_budgets():
            found.append((slug, "", str(Plan((method,)))))
            continue
        found += [(slug, budget, str(Plan((at(method, budget),)))) for budget in BUDGETS]
    return found


def at(method: Method, budget: str) -> Method:
    """The method at a budget."""
    return method.at_budget(budget, LENGTH)


def run(job: tuple[str, str, str, int]) -> Row | str:
    """One row, or why there is none."""
    slug, budget, plan, questions = job
    torch.set_num_threads(1)
    model = text.load()[0]
    try:
        right = tuple(
            tuple(answer.right for answer in measure(model, plan, task, questions, LENGTH, aware, seed=FIRST))
            for task, aware in CELLS
        )
        return Row(slug, budget, plan, right, share_of_bytes(model, plan))
    except WinnowError as error:
        return f"{slug} {budget}: {error}"


def share_of_bytes(model: object, plan: str) -> float:
    """Bytes held behind a text, as a share of the plain ones."""
    if plan == FULL:
        return 1.0
    ids = torch.tensor([draw("pairs", seed, LENGTH, "test").context for seed in range(FIRST, FIRST + 4)])
    with winnow.compress(model, plan) as handle, torch.no_grad():
        model(input_ids=ids, use_cache=True)  # type: ignore[operator]
        return handle.last.kv_bytes / handle.last.kv_bytes_full


def line(row: Row, full: Row) -> tuple[str, ...]:
    cells = []
    for own, whole in zip(row.right, full.right, strict=True):
        gap = paired(own, whole)
        shown = f"{sum(own) / len(own):.2f}"
        cells.append(f"**{shown}**" if gap.low <= 0 <= gap.high else shown)
    return (f"`{row.slug}`", row.budget, *cells, f"{row.bytes:.0%}")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--questions", type=int, default=32)
    asked = parser.parse_args()
    jobs = [(*row, asked.questions) for row in plans()]
    rows: list[Row] = []
    said: list[str] = []
    with ProcessPoolExecutor(asked.processes) as pool:
        for number, found in enumerate(pool.map(run, jobs), 1):
            print(
                f"{number}/{len(jobs)}  {found if isinstance(found, str) else (found.slug, found.budget)}", flush=True
            )
            (said if isinstance(found, str) else rows).append(found)  # type: ignore[arg-type]
    full = rows[0]
    lines = [line(row, full) for row in rows]
    notes = "".join(f"- {text}\n" for text in said)
    body = f"{HEAD}\n{asked.questions} texts in each cell.\n\n{table(HEADS, lines)}\n"
    TARGET.write_text(body + (f"\nNot measured:\n\n{notes}" if said else ""), encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
