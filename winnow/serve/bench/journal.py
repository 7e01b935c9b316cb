"""The file of a run: JSON lines, one for the run and one for each group of cells that ran next to each other."""

from __future__ import annotations

import json
import os
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from winnow.core.errors import WinnowError
from winnow.serve.bench.client import Outcome

VERSION = 1


@dataclass(frozen=True)
class Cell:
    """The requests of one plan, at one number of clients, in one round.

    Attributes:
        seconds: from the first request to the last answer.
        first, total: milliseconds of the requests that were answered, in the order in which they were asked.
        prompt, kept, answer: tokens of all of them; kept is None where the server does not say.
        right: how many were answered right.
        errors: how many ended with which error.
    """

    seconds: float
    first: tuple[float, ...]
    total: tuple[float, ...]
    prompt: int
    kept: int | None
    answer: int
    right: int
    errors: dict[str, int]

    @classmethod
    def of(cls, outcomes: Sequence[Outcome], right: int, seconds: float) -> Cell:
        good = [own for own in outcomes if not own.error]
        kept = [own.kept for own in good if own.kept is not None]
        return cls(
            seconds=round(seconds, 4),
            first=tuple(round(own.first, 2) for own in good),
            total=tuple(round(own.total, 2) for own in good),
            prompt=sum(own.prompt for own in good),
            kept=sum(kept) if kept else None,
            answer=sum(own.answer for own in good),
            right=right,
            errors=dict(Counter(own.error for own in outcomes if own.error)),
        )


@dataclass(frozen=True)
class Group:
    """The cells of all plans that ran next to each other: those of one round at one number of clients."""

    round: int
    clients: int
    cells: dict[str, Cell]


class Journal:
    """What a run has measured so far.

    Args:
        settings: what could change a figure; a file of other settings is another run.
        about: the machine, for the reader; written once.
        fresh: forget what the file holds.

    Raises:
        WinnowError: the file holds another run, or something else.
    """

    def __init__(self, path: Path, settings: dict[str, Any], about: dict[str, Any], *, fresh: bool = False) -> None:
        self.path, self.settings, self.about = path, settings, about
        self.groups: list[Group] = []
        if path.exists() and not fresh:
            self._read()
        else:
            path.parent.mkdir(parents=True, exist_ok=True)
            head = {"kind": "run", "version": VERSION, "settings": settings, "about": about}
            path.write_text(json.dumps(head) + "\n", encoding="utf-8")

    def has(self, number: int, clients: int) -> bool:
        return any((group.round, group.clients) == (number, clients) for group in self.groups)

    def add(self, group: Group) -> None:
        """Append a group; it is on the disk when this returns."""
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps({"kind": "group"} | asdict(group)) + "\n")
            file.flush()
            os.fsync(file.fileno())
        self.groups.append(group)

    def _read(self) -> None:
        raw = self.path.read_bytes()
        whole = raw[: raw.rfind(b"\n") + 1]  # a process that was killed can leave half a line
        try:
            head, *rest = [json.loads(line) for line in whole.splitlines()]
            known = (head["kind"], head["version"]) == ("run", VERSION)
            groups = [_group(line) for line in rest]
            settings, about = head["settings"], head["about"]
        except (ValueError, KeyError, TypeError, AttributeError):
            known = False
        if not known:
            raise WinnowError(f"{self.path} is no run of bench-serve; give another --out, or --fresh to write over it.")
        if settings != self.settings:
            differ = sorted(
                name for name in {*settings, *self.settings} if settings.get(name) != self.settings.get(name)
            )
            raise WinnowError(
                f"{self.path} holds a run with another {', '.join(differ)}; give another --out, or --fresh to forget "
                "it."
            )
        self.about, self.groups = about, groups
        if whole != raw:
            os.truncate(self.path, len(whole))


def _group(line: dict[str, Any]) -> Group:
    return Group(line["round"], line["clients"], {plan: _cell(own) for plan, own in line["cells"].items()})


def _cell(own: dict[str, Any]) -> Cell:
    return Cell(**own | {"first": tuple(own["first"]), "total": tuple(own["total"])})
