"""Store: results in one SQLite file (WAL). Writes are whole batches or nothing, so a killed sweep can resume.

store = Store("runs.sqlite")
for cell in store.cells(store.runs()[0].key):
    print(cell.label, cell.budget, sum(a.correct for a in store.answers(cell.id)))
"""

from __future__ import annotations

import contextlib
import dataclasses
import datetime
import json
import os
import sqlite3
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, TypeVar

from winnow.bench.schema import TABLES, VERSION, Answer, Cell, Overlay, Question, Run, Timing
from winnow.core.errors import WinnowError

R = TypeVar("R")
WAIT = 60  # seconds that a writer waits for another process


class Store:
    """Results of any number of runs.

    Args:
        path: of the file; with `create` it is made where it does not exist.

    Raises:
        WinnowError: the file does not exist, or is not a store of this version.
    """

    def __init__(self, path: str | os.PathLike[str], *, create: bool = False) -> None:
        self.path = Path(path)
        if not create and not self.path.is_file():
            raise WinnowError(f"There is no store {self.path}; make one with `winnow bench --store {self.path}`.")
        if create:
            self.path.parent.mkdir(parents=True, exist_ok=True)
        self._db = sqlite3.connect(self.path, timeout=WAIT, isolation_level=None)
        self._db.row_factory = sqlite3.Row
        self._open(create)
        with contextlib.suppress(sqlite3.Error):  # a reader of a file that nobody may write needs no such thing
            self._db.execute("PRAGMA synchronous = NORMAL")

    def _open(self, create: bool) -> None:
        try:
            found = self._db.execute("PRAGMA user_version").fetchone()[0]
            tables = self._db.execute("SELECT count(*) FROM sqlite_master").fetchone()[0]
            if found == VERSION and tables:
                return
            if create and not found and not tables:
                self._make()
                return
            broken = f"has tables of version {found}; this winnow reads version {VERSION}" if found else "holds no runs"
        except sqlite3.OperationalError:
            broken = "cannot be opened here"
        except sqlite3.DatabaseError:
            broken = "is not an SQLite file, or it is damaged"
        self._db.close()
        raise WinnowError(f"{self.path} {broken}; give another path with --store.")

    def _make(self) -> None:
        self._db.execute("PRAGMA journal_mode = WAL")
        with self.transaction():
            for statement in filter(str.strip, TABLES.split(";")):
                self._db.execute(statement)
            self._db.execute(f"PRAGMA user_version = {VERSION}")

    def close(self) -> None:
        self._db.close()

    def __enter__(self) -> Store:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    @contextlib.contextmanager
    def transaction(self) -> Iterator[None]:
        """One transaction: everything written inside is kept, or nothing."""
        try:
            self._db.execute("BEGIN IMMEDIATE")
            try:
                yield
            except BaseException:
                with contextlib.suppress(sqlite3.Error):  # SQLite has rolled back by itself when the disk is full
                    self._db.execute("ROLLBACK")
                raise
            self._db.execute("COMMIT")
            return
        except sqlite3.OperationalError:
            pass
        raise WinnowError(
            f"The store {self.path} cannot be written: the disk is full, it is read-only, or another process holds it. "
            "What was finished is kept; mend that and run the same command again."
        )

    def add_run(self, key: str, settings: dict[str, Any], environment: dict[str, Any]) -> None:
        """Begin a run, or go on with it: the same key is the same run."""
        now = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
        self._insert("runs", "OR IGNORE", [{"key": key, "settings": _dump(settings),
                                            "environment": _dump(environment), "created": now}])  # fmt: skip

    def add_cell(self, run: str, cell: Cell) -> int:
        """The id of a cell of a run, which is made where it does not exist."""
        names = ("plan", "label", "kind", "budget", "keep")
        self._insert("cells", "OR IGNORE", [{"run": run} | {name: getattr(cell, name) for name in names}])
        found = self._db.execute("SELECT id FROM cells WHERE run = ? AND plan = ?", (run, cell.plan))
        return found.fetchone()[0]

    def mark(self, cell: int, status: str, note: str = "") -> None:
        """Set the status of a whole cell."""
        self._db.execute("UPDATE cells SET status = ?, note = ? WHERE id = ?", (status, note, cell))

    def add_questions(self, questions: Iterable[Question]) -> None:
        rows = [dataclasses.asdict(q) | {"evidence": _dump(q.evidence)} for q in questions]
        with self.transaction():
            self._insert("questions", "OR IGNORE", rows)

    def add_batch(
        self, cell: int, answers: Iterable[Answer], overlays: Iterable[Overlay] = (), status: str = "", note: str = ""
    ) -> None:
        """One batch of one cell, and the cell's new status if there is one: all of it or nothing."""
        kept = [
            dataclasses.asdict(o)
            | {"kept": _dump(o.kept), "grid": _dump(o.grid), "merged": None if o.merged is None else _dump(o.merged)}
            for o in overlays
        ]
        with self.transaction():
            self._insert("answers", "OR REPLACE", [vars(a) for a in answers])
            self._insert("overlays", "OR REPLACE", kept)
            if status:
                self.mark(cell, status, note)

    def settle(self, run: str, full: str) -> None:
        """Compare all answers of a run with those of the cell whose plan is `full`, and sum up errors on the cells."""
        error = "(SELECT min(status) FROM answers WHERE cell = cells.id AND status LIKE 'error:%')"
        with self.transaction():
            self._db.execute(
                "UPDATE answers SET agrees = (SELECT f.answer = answers.answer FROM answers f JOIN cells c ON c.id = "
                "f.cell WHERE c.run = ?1 AND c.plan = ?2 AND f.question = answers.question AND f.status NOT LIKE "
                "'error:%') WHERE cell IN (SELECT id FROM cells WHERE run = ?1) AND status NOT LIKE 'error:%'",
                (run, full),
            )
            self._db.execute(
                f"UPDATE cells SET status = coalesce({error}, 'ok'), "  # noqa: S608
                f"note = CASE WHEN {error} IS NULL THEN '' ELSE note END "
                "WHERE run = ? AND status != 'mismatch' AND id IN (SELECT cell FROM answers)",
                (run,),
            )

    def forget(self, run: str) -> None:
        """Delete the results of a run."""
        own = "(SELECT id FROM cells WHERE run = ?)"
        with self.transaction():
            for table in ("answers", "overlays"):
                self._db.execute(f"DELETE FROM {table} WHERE cell IN {own}", (run,))  # noqa: S608
            for table in ("cells", "questions", "timings"):
                self._db.execute(f"DELETE FROM {table} WHERE run = ?", (run,))  # noqa: S608
            self._db.execute("DELETE FROM runs WHERE key = ?", (run,))

    def add_timings(self, timings: Iterable[Timing]) -> None:
        with self.transaction():
            self._insert("timings", "OR REPLACE", [dataclasses.asdict(t) for t in timings])

    def answered(self, cell: int) -> set[str]:
        """Questions that need not be asked again; an error does not count as an answer."""
        found = self._db.execute("SELECT question FROM answers WHERE cell = ? AND status NOT LIKE 'error:%'", (cell,))
        return {row[0] for row in found}

    def runs(self) -> list[Run]:
        """All runs, oldest first."""
        return [
            Run(row["key"], json.loads(row["settings"]), json.loads(row["environment"]), row["created"])
            for row in self._db.execute("SELECT * FROM runs ORDER BY created, key")
        ]

    def run(self, key: str) -> Run:
        for run in self.runs():
            if run.key == key:
                return run
        raise WinnowError(f"The store {self.path} has no run {key!r}.")

    def cells(self, run: str) -> list[Cell]:
        """The cells of a run: baselines first, then by label and the number of tokens kept, most first."""
        found = [Cell(**row) for row in self._db.execute("SELECT * FROM cells WHERE run = ?", (run,))]
        return sorted(found, key=lambda c: (c.kind, c.label, -(c.keep or 0), c.plan))

    def questions(self, run: str) -> list[Question]:
        rows = self._db.execute("SELECT * FROM questions WHERE run = ? ORDER BY question", (run,))
        return [Question(**{**row, "evidence": tuple(map(tuple, json.loads(row["evidence"])))}) for row in rows]

    def answers(self, cell: int) -> list[Answer]:
        """The answers of a cell, by question."""
        rows = self._db.execute("SELECT * FROM answers WHERE cell = ? ORDER BY question", (cell,))
        return [
            Answer(**{**row, "correct": bool(row["correct"]), "agrees": _maybe(bool, row["agrees"])}) for row in rows
        ]

    def overlays(self, cell: int) -> list[Overlay]:
        rows = self._db.execute("SELECT * FROM overlays WHERE cell = ? ORDER BY question", (cell,))
        return [
            Overlay(
                row["cell"],
                row["question"],
                tuple(json.loads(row["kept"])),
                _maybe(lambda text: {int(k): tuple(v) for k, v in json.loads(text).items()}, row["merged"]),
                tuple(json.loads(row["grid"])),
            )
            for row in rows
        ]

    def timings(self, run: str) -> list[Timing]:
        """Timed repeats, by plan, batch, phase and repeat."""
        rows = self._db.execute("SELECT * FROM timings WHERE run = ? ORDER BY plan, batch, phase, repeat", (run,))
        return [Timing(**row) for row in rows]

    def export_json(self, path: str | os.PathLike[str], *, measured: bool = False) -> Path:
        """Write all runs as JSON, in one order for equal results: however often a sweep was killed, equal bytes.

        Args:
            measured: also what no second run repeats: when and where it ran, and its timings.
        """
        content = _dump({"schema": VERSION, "runs": [self._exported(run, measured) for run in self._sorted_runs()]})
        target = Path(path)
        part = target.with_name(f".{target.name}.part")
        part.write_text(content + "\n", encoding="utf-8")
        os.replace(part, target)
        return target

    def _sorted_runs(self) -> list[Run]:
        return sorted(self.runs(), key=lambda run: run.key)

    def _exported(self, run: Run, measured: bool) -> dict[str, Any]:
        cells = []
        for cell in self.cells(run.key):
            cells.append(
                _without(cell, "id", "run")
                | {
                    "answers": [_without(a, "cell") for a in self.answers(cell.id)],
                    "overlays": [_without(o, "cell") for o in self.overlays(cell.id)],
                }
            )
        found: dict[str, Any] = {
            "key": run.key,
            "settings": run.settings,
            "questions": [_without(q, "run") for q in self.questions(run.key)],
            "cells": cells,
        }
        if measured:
            found |= {"created": run.created, "environment": run.environment}
            found["timings"] = [_without(t, "run") for t in self.timings(run.key)]
        return found

    def _insert(self, table: str, mode: str, rows: list[dict[str, Any]]) -> None:
        if rows:
            names = list(rows[0])
            marks = ", ".join(f":{name}" for name in names)
            # Table and column names are this module's own; values are bound.
            self._db.executemany(f"INSERT {mode} INTO {table} ({', '.join(names)}) VALUES ({marks})", rows)  # noqa: S608


def _dump(value: Any) -> str:
    return json.dumps(value, sort_keys=True, ensure_ascii=False, separators=(",", ":"))


def _maybe(make: Any, value: Any) -> Any:
    return None if value is None else make(value)


def _without(record: Any, *names: str) -> dict[str, Any]:
    return {name: value for name, value in dataclasses.asdict(record).items() if name not in names}
