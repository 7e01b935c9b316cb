"""The tables of a store, and the records that a reader gets from them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

VERSION = 1  # of the tables; kept in `PRAGMA user_version`, and part of every run's key

TABLES = """
CREATE TABLE IF NOT EXISTS runs (
    key TEXT PRIMARY KEY, settings TEXT NOT NULL, environment TEXT NOT NULL, created TEXT NOT NULL);
CREATE TABLE IF NOT EXISTS cells (
    id INTEGER PRIMARY KEY, run TEXT NOT NULL REFERENCES runs(key), plan TEXT NOT NULL, label TEXT NOT NULL,
    kind TEXT NOT NULL, budget TEXT NOT NULL, keep INTEGER, status TEXT NOT NULL DEFAULT 'ok',
    note TEXT NOT NULL DEFAULT '', UNIQUE (run, plan));
CREATE TABLE IF NOT EXISTS questions (
    run TEXT NOT NULL REFERENCES runs(key), question TEXT NOT NULL, type TEXT NOT NULL, text TEXT NOT NULL,
    truth TEXT NOT NULL, image TEXT NOT NULL, evidence TEXT NOT NULL, PRIMARY KEY (run, question));
CREATE TABLE IF NOT EXISTS answers (
    cell INTEGER NOT NULL REFERENCES cells(id), question TEXT NOT NULL, type TEXT NOT NULL, truth TEXT NOT NULL,
    answer TEXT NOT NULL, correct INTEGER NOT NULL, agrees INTEGER, evidence_recall REAL, kept INTEGER,
    layer_tokens REAL, flops INTEGER, flops_full INTEGER, kv_bytes INTEGER, kv_bytes_full INTEGER,
    status TEXT NOT NULL, PRIMARY KEY (cell, question));
CREATE TABLE IF NOT EXISTS overlays (
    cell INTEGER NOT NULL REFERENCES cells(id), question TEXT NOT NULL, kept TEXT NOT NULL, merged TEXT,
    grid TEXT NOT NULL, PRIMARY KEY (cell, question));
CREATE TABLE IF NOT EXISTS timings (
    run TEXT NOT NULL REFERENCES runs(key), plan TEXT NOT NULL, phase TEXT NOT NULL, batch INTEGER NOT NULL,
    value_ms REAL NOT NULL, repeat INTEGER NOT NULL, interleave INTEGER NOT NULL,
    PRIMARY KEY (run, plan, phase, batch, repeat));
"""


@dataclass(frozen=True)
class Run:
    """What was measured with: `settings` could change a result and make the key; `environment` is what it ran on."""

    key: str
    settings: dict[str, Any]
    environment: dict[str, Any]
    created: str


@dataclass(frozen=True)
class Cell:
    """One plan at one budget.

    Attributes:
        plan: a plan's key, or `baseline:<name>:<budget>`.
        label: what tables call it: the slug, or the baseline's name.
        kind: method or baseline.
        budget: as the user wrote it ("64", "25%"; "" for the full model).
        keep: content tokens that the budget means for this model, where that is one number.
        status: `ok`; `mismatch`: the sweep's answers are not those of `model.generate`, so they must not be used;
            `error:<code>`: no question could be asked. `note` says more.
        id, run: where it is in a store.
    """

    plan: str
    label: str
    kind: str
    budget: str
    keep: int | None
    status: str = "ok"
    note: str = ""
    id: int = 0
    run: str = ""


@dataclass(frozen=True)
class Question:
    """One question of a run.

    Attributes:
        image: how to get the picture again: `world:<split>:<seed>:<size>`, or a path relative to the data file.
        evidence: boxes x0, y0, x1, y1 as fractions of the picture; of a clip t0, t1 behind them.
    """

    run: str
    question: str
    type: str
    text: str
    truth: str
    image: str
    evidence: tuple[tuple[float, ...], ...]


@dataclass(frozen=True)
class Answer:
    """One question in one cell.

    Attributes:
        agrees: whether the full model gives the same answer; None until it has answered.
        evidence_recall: share of the evidence's tokens that an LM layer reads, mean over layers; None without evidence.
        kept: content tokens left after the last step.
        layer_tokens: real tokens of the prompt that a layer of the LM read, mean over layers.
        flops, flops_full: of the LM's prefill, and of the full model's.
        kv_bytes, kv_bytes_full: keys and values of this prompt after prefill, and of the full model.
        status: `ok`, `empty` (no text; counted as wrong), `none` (said "None"), `long` (cut at the limit),
            `error:<code>`.
    """

    cell: int
    question: str
    type: str
    truth: str
    answer: str
    correct: bool
    agrees: bool | None
    evidence_recall: float | None
    kept: int | None
    layer_tokens: float | None
    flops: int | None
    flops_full: int | None
    kv_bytes: int | None
    kv_bytes_full: int | None
    status: str


@dataclass(frozen=True)
class Overlay:
    """What was kept of one picture: content ids, what was merged into each (None: nothing), and the grid [h, w]."""

    cell: int
    question: str
    kept: tuple[int, ...]
    merged: dict[int, tuple[int, ...]] | None
    grid: tuple[int, int]


@dataclass(frozen=True)
class Timing:
    """One timed repeat of one phase; repeats of the same `interleave` ran next to each other."""

    run: str
    plan: str
    phase: str
    batch: int
    value_ms: float
    repeat: int
    interleave: int
