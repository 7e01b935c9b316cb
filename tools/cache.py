"""Measure what the methods of the KV cache keep of long contexts, and write the page of it.

    python tools/cache.py [--processes 2] [--questions 32] [--albums 20] [--anew]   docs/cache.md

Every method at every budget, on the reference text model and on the reference picture model. What was measured by the
same code is kept in `out/cache-table.jsonl`: a run that was stopped goes on where it was, and `--anew` forgets it.
"""

from __future__ import annotations

import argparse
import functools
import hashlib
import json
import os
import sys
import time
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from multiprocessing import get_context
from pathlib import Path
from typing import Any, cast

os.environ.setdefault("OMP_NUM_THREADS", "1")
ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tools")]

import torch  # noqa: E402
from cache_page import BYTES, FITTED, LENGTH, TEXTS, Cell, Row, abilities, able, page  # noqa: E402

import winnow  # noqa: E402
from winnow import reference  # noqa: E402
from winnow.bench.encodings import Encodings  # noqa: E402
from winnow.bench.recall import FULL, measure  # noqa: E402
from winnow.bench.recall_pictures import Task, measure_pictures  # noqa: E402
from winnow.core.errors import WinnowError  # noqa: E402
from winnow.core.plan import Plan  # noqa: E402
from winnow.core.registry import built_in, method_class  # noqa: E402
from winnow.models.quiet import quiet  # noqa: E402
from winnow.reference import text  # noqa: E402
from winnow.world.recall import draw  # noqa: E402

TARGET = ROOT / "docs" / "cache.md"
STORE = ROOT / "out" / "cache-table.jsonl"
FIRST = 1000  # the first text: those before were looked at while the model was trained
BUDGETS = ("50%", "25%", "12.5%", "5%")
MEASURED = ("bench", "cache", "core", "engine", "methods", "models", "parts", "reference", "signals", "world")

Found = dict[str, Any]


@functools.cache
def text_model() -> Any:
    return text.load()[0]


@functools.cache
def encodings() -> Encodings:
    """Of the albums, by this process: the methods of the cache differ behind the tower alone."""
    return Encodings()


@functools.cache
def picture_model() -> tuple[Any, Any]:
    return reference.load()


def plans() -> list[tuple[str, str, str]]:
    """(slug, budget, plan) of every row; a codec has no budget."""
    found = [(FULL, "", FULL)]
    for slug, entry in sorted(built_in().items()):
        if not entry.of_cache or "generator" in entry.stages:
            continue
        kind = method_class(slug)
        method = kind.configured(**FITTED.get(slug, {}))
        if not kind.takes_budgets():
            found.append((slug, "", str(Plan((method,)))))
            continue
        found += [(slug, budget, str(Plan((method.at_budget(budget, LENGTH),)))) for budget in BUDGETS]
    return found


def run(slug: str, budget: str, plan: str, cell: Cell, questions: int) -> Found:
    """One cell of one row, or why there is none."""
    torch.set_num_threads(1)
    start = time.perf_counter()
    try:
        found: Found = _answered(slug, plan, cell, questions)
    except WinnowError as error:
        found = {"refused": str(error)}
    return found | {"seconds": time.perf_counter() - start}


def _answered(slug: str, plan: str, cell: Cell, questions: int) -> Found:
    if cell.pictures:
        model, processor = picture_model()
        fitted, task = _fitted(slug, model, plan), cast(Task, cell.task)
        asked = measure_pictures(
            model, processor, fitted, task, questions, cell.pictures, cell.aware, blind=cell.blind, seed=FIRST,
            kept=encodings(),
        )  # fmt: skip
        return {"right": [answer.right for answer in asked]}
    model = text_model()
    plan = _fitted(slug, model, plan)
    if cell.task == "bytes":
        return {"bytes": _share_of_bytes(model, plan)}
    given: Found = {"asks": 1} if cell.task == "several" and cell.aware else {}
    answers = measure(model, plan, cell.task, questions, LENGTH, cell.aware, seed=FIRST, **given)
    return {"right": [answer.right for answer in answers]}


@functools.cache
def _fitted(slug: str, model: Any, plan: str) -> str:
    """The plan, with heads that are those of the model."""
    return str(winnow.calibrate(model, winnow.plan(plan))) if slug == "razorattention" else plan


def _share_of_bytes(model: Any, plan: str) -> float:
    """Bytes held behind a text, as a share of the plain ones."""
    if plan == FULL:
        return 1.0
    ids = torch.tensor([draw("pairs", seed, LENGTH, "test").context for seed in range(FIRST, FIRST + 4)])
    with winnow.compress(model, plan) as handle, torch.no_grad():
        model(input_ids=ids, use_cache=True)
        ledger = handle.last
    return float(ledger.kv_bytes / ledger.kv_bytes_full)  # type: ignore[union-attr]


def code() -> str:
    """A hash of what could change a figure."""
    digest = hashlib.sha256(f"{torch.__version__}".encode())
    for folder in MEASURED:
        for path in sorted((ROOT / "winnow" / folder).rglob("*")):
            if path.suffix in (".py", ".safetensors"):
                digest.update(str(path.relative_to(ROOT)).encode() + path.read_bytes())
    return digest.hexdigest()[:16]


def known(store: Path) -> dict[str, Found]:
    """What the store has, by key."""
    if not store.exists():
        return {}
    lines = store.read_text(encoding="utf-8").splitlines()
    return {line["key"]: line for line in map(json.loads, lines)}


def measured(processes: int, jobs: dict[str, tuple[Any, ...]]) -> dict[str, Found]:
    """All jobs by key: from the store, or run now and put there one by one."""
    found = known(STORE)
    left = {key: job for key, job in jobs.items() if key not in found}
    STORE.parent.mkdir(exist_ok=True)
    with (
        ProcessPoolExecutor(processes, mp_context=get_context("spawn"), initializer=quiet) as pool,
        STORE.open("a", encoding="utf-8") as out,
    ):
        waiting = {pool.submit(run, *job): key for key, job in left.items()}
        for number, done in enumerate(as_completed(waiting), 1):
            key = waiting[done]
            found[key] = {"key": key, **done.result()}
            out.write(json.dumps(found[key]) + "\n")
            out.flush()
            slug, budget, _, cell, _ = jobs[key]
            print(f"{number}/{len(left)}  {slug} {budget}  {cell.head}  {found[key]['seconds']:.0f} s", flush=True)
    return found


def rows(processes: int, questions: int, lines: list[tuple[str, str, str]], cells: Sequence[Cell]) -> list[Row]:
    """Rows of the page: these plans in these cells."""
    version = code()
    jobs = {
        (line[:2], cell): (f"{version} {line[2]} | {cell.head} | {questions}", (*line, cell, questions))
        for line in lines
        for cell in cells
    }
    found = measured(processes, dict(jobs.values()))
    return [Row(*line[:2], {cell: found[jobs[line[:2], cell][0]] for cell in cells}) for line in lines]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--questions", type=int, default=32)
    parser.add_argument("--albums", type=int, default=20, help="in each cell of several pictures, which take longer")
    parser.add_argument("--anew", action="store_true", help="forget what was measured before")
    asked = parser.parse_args()
    if asked.anew:
        STORE.unlink(missing_ok=True)
    start = time.perf_counter()
    every = plans()
    texts = rows(asked.processes, asked.questions, every, (*TEXTS, BYTES))
    (full,) = rows(asked.processes, asked.questions, every[:1], abilities())
    pictures = rows(asked.processes, asked.albums, every, able(full))
    TARGET.write_text(page(texts, pictures, full, asked.questions, asked.albums), encoding="utf-8")
    print(f"{(time.perf_counter() - start) / 60:.1f} minutes")
    return 0


if __name__ == "__main__":
    sys.exit(main())
