"""The page of what the methods of the KV cache keep: its cells, its rows and its words. See `tools/cache.py`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from winnow.bench.intervals import paired
from winnow.learn.markdown import table

LENGTH = 512
COUNTS = (1, 2, 3, 4)  # pictures of an album, in the table of what the picture model can do
# Settings that fit contexts of this length, where the defaults are those of the papers' thousands of tokens.
FITTED: dict[str, dict[str, Any]] = {
    "adakv": {"base": "snapkv"},
    "compresskv": {"window": 8, "floor": 16},
    "ems": {"window": 8, "kernel": 1},
    "pyramidkv": {"window": 8},
    "snapkv": {"window": 8},
}


@dataclass(frozen=True)
class Cell:
    """A column: what is asked, and whether the question is known when the cache is cut.

    Attributes:
        pictures: of an album; 0: a text.
        blind: the question alone.
    """

    task: str
    aware: bool = False
    pictures: int = 0
    blind: bool = False

    @property
    def head(self) -> str:
        """Its name, and the key of what was measured of it."""
        if self.task == "bytes":
            return "bytes"
        of = f"{self.task} of {self.pictures}" if self.pictures else self.task
        return f"{of}, {'blind' if self.blind else 'question known' if self.aware else 'not known'}"


TEXTS = (
    Cell("needle", True),
    Cell("several", True),
    Cell("needle"),
    Cell("several"),
    Cell("pairs"),
)
BYTES = Cell("bytes")
TASKS = ("turns", "frames")


def abilities() -> tuple[Cell, ...]:
    """What is asked of the full cache alone: with which pictures the model can be measured at all."""
    asked = [Cell(task, aware, n) for task in TASKS for n in COUNTS for aware in (True, False)]
    return (*asked, *(Cell(task, pictures=n, blind=True) for task in TASKS for n in COUNTS))


Found = Mapping[str, Any]


@dataclass(frozen=True)
class Row:
    """A line: what was found of a method at a budget, by cell."""

    slug: str
    budget: str
    found: Mapping[Cell, Found]


def able(full: Row) -> tuple[Cell, ...]:
    """The cells of pictures in which methods are compared: the most pictures that the full cache answers for.

    It does where it is right more often than the question alone, by the paired 95 % interval, and in half of all cases.
    """
    chosen: list[Cell] = []
    for task in TASKS:
        for n in sorted(COUNTS, reverse=True):
            cells = [Cell(task, aware, n) for aware in (True, False)]
            blind = full.found[Cell(task, pictures=n, blind=True)]["right"]
            rights = [full.found[cell]["right"] for cell in cells]
            if n > 1 and all(paired(blind, right).low > 0 and sum(right) * 2 >= len(right) for right in rights):
                chosen += cells
                break
    return tuple(chosen)


def share(found: Found) -> str:
    right = found["right"]
    return f"{sum(right) / len(right):.2f}"


def shown(own: Found, full: Found) -> str:
    """A figure; in bold where it is not told from the full cache's."""
    if "refused" in own:
        return "–"
    gap = paired(full["right"], own["right"])
    return f"**{share(own)}**" if gap.low <= 0 <= gap.high else share(own)


def lines(rows: Sequence[Row], cells: Sequence[Cell], full: Row) -> list[tuple[str, ...]]:
    made = []
    for row in rows:
        figures = [shown(row.found[cell], full.found[cell]) for cell in cells]
        if BYTES in row.found:
            own = row.found[BYTES]
            figures.append("–" if "refused" in own else f"{own['bytes']:.0%}")
        made.append((f"`{row.slug}`", row.budget, *figures))
    return made


def ability(full: Row) -> str:
    """The table of what the picture model can do without any method."""
    made = []
    for task in TASKS:
        for n in COUNTS:
            cells = (Cell(task, True, n), Cell(task, False, n), Cell(task, pictures=n, blind=True))
            made.append((task, str(n), *(share(full.found[cell]) for cell in cells)))
    return table(("task", "pictures", "question known", "not known", "no picture"), made)


def refused(rows: Sequence[Row]) -> str:
    """Why cells are empty."""
    said = {f"- `{row.slug}`: {own['refused']}\n" for row in rows for own in row.found.values() if "refused" in own}
    return "\nNot measured:\n\n" + "".join(sorted(said)) if said else ""


def page(texts: Sequence[Row], pictures: Sequence[Row], ability_of: Row, questions: int, albums: int) -> str:
    """The page.

    Args:
        texts, pictures: rows of both tables, the full cache first.
        ability_of: what the full cache answers about albums.
        questions: in each cell of the first two tables.
        albums: in each cell of the last one.
    """
    heads = ("method", "budget", *(cell.head for cell in TEXTS), "bytes")
    body = f"{HEAD}\n{questions} texts in each cell.\n\n{table(heads, lines(texts, TEXTS, texts[0]))}\n"
    body += f"\n{ALBUMS}\n{questions} albums in each cell, the full cache:\n\n{ability(ability_of)}\n"
    compared = able(ability_of)
    left_out = [task for task in TASKS if task not in {cell.task for cell in compared}]
    if left_out:
        body += f"\n{NOT_ABLE.format(tasks=' and '.join(f'*{task}*' for task in left_out))}\n"
    if compared:
        heads = ("method", "budget", *(cell.head for cell in compared))
        body += f"\n{COMPARED.format(albums=albums)}\n{table(heads, lines(pictures, compared, pictures[0]))}\n"
    return body + refused([*texts, *pictures])


_SETTINGS = ", ".join(f"`{slug}:" + ",".join(f"{k}={v}" for k, v in own.items()) + "`" for slug, own in FITTED.items())
HEAD = f"""# What is left of long contexts

Every method of the KV cache on the reference text model (`winnow/reference/recall`), on held-out texts of {LENGTH}
tokens: a *needle* in filler, one of *several* (8) such facts, and one of 24 *pairs* of names and values. **Question
known:** text and question are read together, and the cache is cut behind them, so a method can keep what the question
needs. **Not known:** the text is read and cut alone, and the questions come later, on what is left (4 of *several*).
The two must not be mixed: most scores are the attention of the last tokens.

A budget is slots of a head, a share of what was read; a later turn adds its share. *Bytes* are of the cache behind the
text, as shares of the plain one. A figure is the share of right answers; in bold where the paired 95 % interval of its
difference to the full cache includes 0. Methods have their default settings, but for windows that fit contexts of this
length ({_SETTINGS}).
The first word of an answer is said by the forward that reads the question, whose layers are cut behind it: with the
question known, it is the second word that a method can lose. Of *pairs* the answer is one word, so they are asked with
the question not known alone.
RazorAttention was calibrated on the model; CompressKV was not, so all its heads vote. The model is small and its words
are few: what fails here says where not to take a claim for granted. `make cache-table` remakes this page.
"""
ALBUMS = f"""## Several pictures

On the reference model for pictures (`winnow/reference/small`): an *album* of pictures of winnow's world, and a question
that one of them alone can answer (nothing in the question says which). *Turns*: each picture comes in a turn of its
own, and the cache is cut behind each. *Frames*: all pictures stand in one prompt, as the frames of a video do. Here the
question always comes in a turn of its own, so that every word is said from what was left; where it is *known*, it also
stands in front of the pictures of each turn, and so is read before their cache is cut. `kvpress` cuts the first turn
alone, as the library whose scorers it takes does, and so is no match for the others in *turns*.
`winnow.bench.recall_pictures.measure_pictures` asks the same of any model whose chat template takes a conversation.

This model was trained on one picture in a prompt. What it can do with more, up to {COUNTS[-1]}:
"""
NOT_ABLE = """Methods are compared with the most pictures at which the full cache beats the question alone (paired 95 %
interval) and is right in half of all cases, both ways of asking. There is no such number above one for {tasks}: the
bundled model cannot do it, and nothing is said there of methods."""
COMPARED = "Methods on what the model can do, {albums} albums in each cell:\n"
