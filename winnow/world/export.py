"""Scenes as files: a folder of pictures with their questions, and a contact sheet to look at."""

from __future__ import annotations

import contextlib
import json
import struct
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw
from PIL.PngImagePlugin import PngInfo

from winnow.core.errors import WinnowError
from winnow.world.items import Scene
from winnow.world.names import SIZES, SPLITS
from winnow.world.scenes import VERSION, scene

STAMP = "winnow-world"  # keyword of the PNG text chunk that says where a picture comes from
QUESTIONS = "questions.jsonl"


@dataclass(frozen=True)
class Origin:
    """Where a picture of winnow's world comes from: enough to draw it again."""

    version: int
    seed: int
    size: int
    split: str


def save_picture(drawn: Scene, path: Path) -> None:
    """Write the picture as a PNG that carries its origin in a text chunk."""
    info = PngInfo()
    info.add_text(STAMP, json.dumps(asdict(Origin(VERSION, drawn.seed, drawn.size, drawn.split))))
    drawn.image.save(path, format="PNG", pnginfo=info)


def origin(source: str | Path | bytes) -> Origin | None:
    """The origin that a PNG file (or its bytes) says it has, or None: then the picture is not from winnow's world.

    Only the chunks before the pixels are read, and nothing is decoded. The stamp is a label, not a proof.
    """
    if isinstance(source, bytes):
        head = source[:4096]
    else:
        try:
            with Path(source).open("rb") as file:
                head = file.read(4096)
        except OSError as error:
            raise WinnowError(f"cannot read the picture {Path(source).name!r}; check that the file exists") from error
    if not head.startswith(b"\x89PNG\r\n\x1a\n"):
        return None
    at = 8
    while at + 8 <= len(head):
        (length,) = struct.unpack_from(">I", head, at)
        kind, body = head[at + 4 : at + 8], head[at + 8 : at + 8 + length]
        if kind == b"IDAT":
            return None
        keyword, _, text = body.partition(b"\0")
        if kind == b"tEXt" and keyword == STAMP.encode():
            return _parse(text)
        at += 12 + length
    return None


def _parse(text: bytes) -> Origin | None:
    try:
        values = json.loads(text)
        return Origin(int(values["version"]), int(values["seed"]), int(values["size"]), str(values["split"]))
    except (ValueError, KeyError, TypeError):
        return None


def scene_in(source: str | Path | bytes, image: Image.Image) -> Scene | None:
    """The scene that a PNG file (or its bytes) says it holds, if drawing it again gives the pixels of `image`."""
    said = origin(source)
    if said is None or said.version != VERSION or said.split not in SPLITS or said.size not in SIZES:
        return None
    with contextlib.suppress(WinnowError):  # the stamp is not ours: its seed is out of range
        drawn = scene(said.seed, said.size, said.split)
        if np.array_equal(drawn.pixels, np.asarray(image)):
            return drawn
    return None


def export(folder: str | Path, n: int, size: int = 224, split: str = "test", seed: int = 0, per_type: int = 1) -> Path:
    """Write `n` scenes from `seed` on as PNG files, and their questions as JSON lines; return the path of the lines.

    One line per question: image (a name in the folder), question, answer, type, evidence ([x0, y0, x1, y1] in pixels).
    """
    target = Path(folder)
    lines = target / QUESTIONS
    if n < 1:
        raise WinnowError(f"{n} scenes were asked for; ask for at least 1")
    if lines.exists():
        raise WinnowError(f"{target} already holds an export; choose another folder or delete {QUESTIONS}")
    target.mkdir(parents=True, exist_ok=True)
    with lines.open("w") as file:
        for number in range(seed, seed + n):
            drawn = scene(number, size, split, per_type=per_type)
            name = f"{split}-{number:06d}.png"
            save_picture(drawn, target / name)
            for question in drawn.questions:
                row = {
                    "image": name,
                    "question": question.text,
                    "answer": question.answer,
                    "type": question.type,
                    "evidence": [list(box) for box in question.evidence],
                }
                file.write(json.dumps(row) + "\n")
    return lines


def show(
    path: str | Path,
    n: int = 20,
    size: int = 224,
    split: str = "test",
    seed: int = 0,
    columns: int = 5,
    boxes: bool = False,
) -> Path:
    """Write a contact sheet of `n` scenes with their questions below each; `boxes` outlines the evidence in red."""
    if n < 1:
        raise WinnowError(f"{n} scenes were asked for; ask for at least 1")
    target, cells = Path(path), []
    for number in range(seed, seed + n):
        drawn = scene(number, size, split)
        cell = Image.new("RGB", (size + 8, size + 156), "white")
        cell.paste(drawn.image, (4, 4))
        draw = ImageDraw.Draw(cell)
        for line, question in enumerate(drawn.questions):
            draw.text((4, size + 6 + 11 * line), f"{question.text} {question.answer}", fill="black", font_size=10)
            for box in question.evidence if boxes else ():
                draw.rectangle((box.x0 + 4, box.y0 + 4, box.x1 + 3, box.y1 + 3), outline="red")
        cells.append(np.asarray(cell))
    columns = min(columns, n)
    cells += [np.full_like(cells[0], 255)] * (-n % columns)
    rows = [np.concatenate(cells[i : i + columns], 1) for i in range(0, len(cells), columns)]
    target.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.concatenate(rows, 0)).save(target, format="PNG")
    return target
