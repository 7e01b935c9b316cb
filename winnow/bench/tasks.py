"""Tasks: questions with answers, from winnow's own world or from a file of the user's.

A data file has a row of JSON on each line:

    {"image": "kitchen.png", "question": "What is on the table?", "answer": "a cup",
     "evidence": [[10, 20, 80, 90]], "type": "objects", "id": "kitchen-1"}

`image` is a path relative to the file; `evidence` (boxes x0, y0, x1, y1 in pixels of the upright picture, on which the
answer depends), `type` and `id` may be left out. `winnow world export FOLDER` writes such a file.
"""

from __future__ import annotations

import functools
import hashlib
import json
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from PIL import Image

from winnow.core.errors import WinnowError
from winnow.media import MediaError, fingerprint, open_image
from winnow.world import TYPES, VERSION, Scene, fractions, scene

Boxes = tuple[tuple[float, ...], ...]  # x0, y0, x1, y1; of a clip t0, t1 behind them: see `Layout.covering`

SCENES_FOR_EACH = 200  # drawn at most for one question of a type, before the world is said to have no more
LONGEST_ROW = 2**20  # bytes
EXPORT = "`winnow world export FOLDER` writes a data file to start from"


@dataclass(frozen=True)
class Ask:
    """One question.

    Attributes:
        image: how to get the picture again (see `open`).
        evidence, objects: fractions of the picture; objects are all things in it, where they are known.
    """

    id: str
    type: str
    text: str
    truth: str
    image: str
    evidence: Boxes = ()
    objects: Boxes = ()


@dataclass(frozen=True)
class Task:
    """Questions, and what identifies them.

    Attributes:
        settings: what could change a result; part of a run's key.
        bad: rows that could not be used, by name, each with the reason.
        open: the picture of a question, upright RGB; of a clip its frames, uint8 [T, S, S, 3].
        shows: baselines that show less, by name: from the frames of a question to those that the model gets.
    """

    settings: dict[str, Any]
    questions: tuple[Ask, ...]
    open: Callable[[Ask], Any] = field(repr=False, compare=False)
    bad: tuple[str, ...] = ()
    shows: Mapping[str, Callable[[Any, Ask], Any]] = field(default_factory=dict, repr=False, compare=False)


def world_task(
    count: int,
    *,
    split: str = "test",
    seed: int = 0,
    size: int = 224,
    types: Sequence[str] = TYPES,
    per_scene: int | None = None,
) -> Task:
    """`count` questions of winnow's world, as equally many of each type as can be, from consecutive scenes.

    Args:
        per_scene: questions of one scene at most.
    """
    if count < 1:
        raise WinnowError(f"questions={count}; ask at least 1.")
    left = {kind: count // len(types) + (i < count % len(types)) for i, kind in enumerate(types)}
    asked: list[Ask] = []
    for number in range(seed, seed + SCENES_FOR_EACH * max(left.values())):
        if not any(left.values()):
            break
        drawn = _scene(number, size, split)
        wanted = [place for place, question in enumerate(drawn.questions) if left.get(question.type, 0) > 0]
        if per_scene is not None:  # types that most are left of come first
            wanted = sorted(wanted, key=lambda place: -left[drawn.questions[place].type])[:per_scene]
        for place in wanted:
            if left[drawn.questions[place].type] > 0:
                left[drawn.questions[place].type] -= 1
                asked.append(_of_world(drawn, place))
    missing = {kind: n for kind, n in left.items() if n}
    if missing:
        raise WinnowError(
            f"The split {split!r} gives too few questions of {', '.join(missing)}; ask fewer than {count}."
        )
    settings = {"task": "world", "version": VERSION, "split": split, "seed": seed, "size": size}
    return Task(settings | identity(asked), tuple(asked), open_world)


def world_turns(count: int, *, split: str = "test", seed: int = 0, size: int = 224) -> tuple[tuple[Ask, Ask], ...]:
    """`count` pairs of questions, both about one scene and with different evidence, from consecutive scenes."""
    if count < 1:
        raise WinnowError(f"pairs={count}; ask at least 1.")
    pairs: list[tuple[Ask, Ask]] = []
    for number in range(seed, seed + SCENES_FOR_EACH * count):
        drawn = _scene(number, size, split)
        asked = [_of_world(drawn, place) for place in range(len(drawn.questions))]
        second = next((ask for ask in asked[1:] if ask.evidence and ask.evidence != asked[0].evidence), None)
        if second is not None and asked[0].evidence:
            pairs.append((asked[0], second))
        if len(pairs) == count:
            return tuple(pairs)
    raise WinnowError(f"The split {split!r} gives too few scenes with two questions; ask fewer than {count} pairs.")


def _of_world(drawn: Scene, place: int) -> Ask:
    question = drawn.questions[place]
    return Ask(
        id=f"{drawn.split}-{drawn.seed:06d}-{place:02d}",
        type=question.type,
        text=question.text,
        truth=question.answer,
        image=f"world:{drawn.split}:{drawn.seed}:{drawn.size}",
        evidence=tuple(fractions(question.evidence, drawn.size)),
        objects=tuple(fractions([item.box for item in drawn.objects], drawn.size)),
    )


def open_world(ask: Ask) -> Image.Image:
    """Draw the picture of a world question again."""
    _, split, seed, size = ask.image.split(":")
    return _scene(int(seed), int(size), split).image


@functools.lru_cache(maxsize=64)
def _scene(seed: int, size: int, split: str) -> Scene:
    return scene(seed, size, split)


def data_task(path: str | Path, count: int | None = None) -> Task:
    """The first `count` usable rows of a data file (format: see above); `bad` lists the others.

    Every picture is opened once, so that a bad one is known before the sweep begins.
    """
    file = Path(path)
    if not file.is_file():
        raise WinnowError(f"There is no data file {file}; {EXPORT}.")
    asked: list[Ask] = []
    bad: list[str] = []
    prints: list[str] = []
    ids: set[str] = set()
    for name, raw in _rows(file):
        if count is not None and len(asked) == count:
            break
        try:
            ask, print_ = _of_row(raw, name, file.parent)
            if ask.id in ids:
                raise WinnowError(f"the id {ask.id!r} is taken by an earlier row")
        except MediaError as error:
            bad.append(f"{name}: the picture cannot be used: {error}")
            continue
        except WinnowError as error:
            bad.append(f"{name}: {error}")
            continue
        ids.add(ask.id)
        asked.append(ask)
        prints.append(print_)
    if not asked:
        shown = "; ".join(bad[:3]) or "it is empty"
        raise WinnowError(f"{file} has no row that can be used ({shown}). {EXPORT}.")
    folder = file.parent
    settings = {"task": "data", "name": file.name, "pictures": _digest(prints), "rows_left_out": len(bad)}
    return Task(settings | identity(asked), tuple(asked), lambda ask: open_image(folder / ask.image), tuple(bad))


def _rows(file: Path) -> Iterator[tuple[str, bytes]]:
    """(name, bytes) of each row that is not blank; what is behind `LONGEST_ROW` is cut, and so cannot be read."""
    with file.open("rb") as lines:
        number = 0
        while line := lines.readline(LONGEST_ROW):
            number += 1
            tail = line
            while len(tail) == LONGEST_ROW and not tail.endswith(b"\n"):
                tail = lines.readline(LONGEST_ROW)
            if line.strip():
                yield f"line {number}", line


def _of_row(raw: bytes, name: str, folder: Path) -> tuple[Ask, str]:
    try:
        row = json.loads(raw)
    except (ValueError, RecursionError):
        row = None
    if not isinstance(row, dict):
        raise WinnowError("it is not a JSON object")
    image, text = (_text(row, key) for key in ("image", "question"))
    truth = row.get("answer")
    if isinstance(truth, int | float) and not isinstance(truth, bool):
        truth = str(truth)
    if not isinstance(truth, str) or not truth.strip():
        raise WinnowError(f"its answer is {truth!r}; give a text or a number")
    picture = open_image(folder / image)
    ask = Ask(
        id=_text(row, "id", f"row-{int(name.removeprefix('line ')):06d}"),
        type=_text(row, "type", "all"),
        text=text,
        truth=truth.strip(),
        image=image,
        evidence=_boxes(row.get("evidence", []), *picture.size),
    )
    return ask, fingerprint(picture)


def _text(row: dict[str, Any], key: str, default: str | None = None) -> str:
    value = row.get(key, default)
    if not isinstance(value, str) or not value.strip():
        raise WinnowError(f"its {key} is {value!r}; give a text")
    return value.strip()


def _boxes(given: Any, width: int, height: int) -> Boxes:
    """Pixels to fractions of the picture."""
    found = []
    for box in given if isinstance(given, list) else [given]:
        numbers = isinstance(box, list) and len(box) == 4 and all(isinstance(v, int | float) for v in box)
        if not numbers or not (0 <= box[0] < box[2] <= width and 0 <= box[1] < box[3] <= height):
            raise WinnowError(f"its evidence {box!r} is not a box [x0, y0, x1, y1] in its {width} × {height} pixels")
        found.append((box[0] / width, box[1] / height, box[2] / width, box[3] / height))
    return tuple(found)


def identity(asked: Sequence[Ask]) -> dict[str, Any]:
    """What identifies the questions in the settings of a run."""
    rows = [[a.id, a.type, a.text, a.truth, a.image, a.evidence] for a in asked]
    return {
        "questions": len(asked),
        "types": dict(sorted(Counter(a.type for a in asked).items())),
        "hash": _digest(rows),
    }


def _digest(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, ensure_ascii=False).encode()).hexdigest()[:16]
