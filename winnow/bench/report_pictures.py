"""The overlays of the report: a few questions, and what each method kept of their pictures."""

from __future__ import annotations

import base64
import io
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from winnow.bench.report_data import Report
from winnow.bench.schema import Answer, Overlay, Question
from winnow.bench.store import Store
from winnow.bench.summary import Result
from winnow.bench.tasks import Ask, open_world
from winnow.core.layout import Layout
from winnow.core.reduction import Reduction
from winnow.media import open_image
from winnow.overlay import overlay

PICTURES = 6  # of each method
LARGEST = 512  # pixels of the longer side of an embedded picture
QUALITY = 80
BLANK = Image.new("RGB", (224, 224), (96, 96, 96))


@dataclass(frozen=True)
class Shot:
    """One overlay with its question and the answer that was given on it."""

    question: Question
    answer: Answer | None
    kept: Overlay


@dataclass
class Album:
    """Finds pictures again and draws on them.

    Attributes:
        folder: where the pictures of a data file lie.
        missing: names of pictures that were not found.
    """

    folder: Path
    missing: set[str]

    def picture(self, question: Question) -> Image.Image:
        """The picture of a question, upright; a grey one if the file is gone."""
        try:
            return _picture(question.image, self.folder)
        except (ValueError, OSError):
            self.missing.add(question.image)
            return BLANK


@lru_cache(maxsize=32)
def _picture(name: str, folder: Path) -> Image.Image:
    if name.startswith("world:"):
        return open_world(Ask("", "", "", "", name))
    return open_image(folder / name)


def chosen_budget(report: Report) -> str:
    """The budget whose pictures are shown: the middle one of the methods', the larger of two middles."""
    keeps = {row.cell.budget: row.cell.keep or 0 for row in report.methods if row.usable}
    ordered = sorted(keeps, key=lambda budget: (-keeps[budget], budget))
    return ordered[(len(ordered) - 1) // 2] if ordered else ""


def shots(store: Store, row: Result, report: Report) -> list[Shot]:
    """Up to six overlays of a cell, of different pictures as far as there are; the same questions for every cell."""
    answers = {a.question: a for a in store.answers(row.cell.id)}
    known = [o for o in store.overlays(row.cell.id) if o.question in report.questions]
    seen: Counter[str] = Counter()
    ranked: list[tuple[int, int, Overlay]] = []
    for kept in known:
        image = report.questions[kept.question].image
        ranked.append((seen[image], len(ranked), kept))
        seen[image] += 1
    chosen = [kept for _, _, kept in sorted(ranked, key=lambda r: r[:2])[:PICTURES]]
    return [Shot(report.questions[o.question], answers.get(o.question), o) for o in chosen]


def gallery(store: Store, report: Report, album: Album) -> list[tuple[str, list[dict[str, Any]]]]:
    """For each method: its name, and what the page shows of each of its pictures."""
    budget = chosen_budget(report)
    found = []
    for row in report.methods:
        taken = shots(store, row, report) if row.usable and row.cell.budget in (budget, "") else []
        if taken:
            found.append((row.name, [_shown(shot, album) for shot in taken]))
    return found


def _shown(shot: Shot, album: Album) -> dict[str, Any]:
    drawn, (h, w) = draw(shot, album.picture(shot.question)), shot.kept.grid
    return {
        "url": data_url(drawn),
        "width": drawn.width,
        "height": drawn.height,
        "alt": f"{shot.question.text} {len(shot.kept.kept)} of {h * w} tokens are kept",
        "question": shot.question,
        "answer": shot.answer,
        "clusters": clusters(shot.kept),
        "grid": (h, w),
    }


def draw(shot: Shot, picture: Image.Image) -> Image.Image:
    """`winnow.overlay` on the picture: kept clear, merged half clear, dropped grey, the evidence outlined."""
    h, w = shot.kept.grid
    layout = Layout.grid(h, w)
    boxes = [
        (x0 * picture.width, y0 * picture.height, x1 * picture.width, y1 * picture.height)
        for x0, y0, x1, y1 in shot.question.evidence
    ]
    drawn = overlay(picture, layout, reduction(shot.kept), evidence=boxes)
    drawn.thumbnail((LARGEST, LARGEST), Image.Resampling.LANCZOS)
    return drawn


def reduction(kept: Overlay) -> Reduction:
    """The map that a stored overlay stands for; weights are not stored, so they are 1."""
    n = kept.grid[0] * kept.grid[1]
    slot = {token: i for i, token in enumerate(dict.fromkeys(t for t in kept.kept if 0 <= t < n))}
    anchor = torch.tensor(list(slot), dtype=torch.int64)
    if not kept.merged:
        return Reduction.select(anchor, n, ordered=False)
    pairs = set(slot.items())
    pairs |= {(s, slot[to]) for to, sources in kept.merged.items() if to in slot for s in sources if 0 <= s < n}
    edges = torch.tensor(sorted(pairs), dtype=torch.int64).reshape(-1, 2)
    return Reduction.edges(edges[:, 0], edges[:, 1], n=n, m=len(slot), representative=anchor, ordered=False)


def clusters(kept: Overlay) -> list[tuple[tuple[float, float], list[tuple[float, float]]]]:
    """For each token that others were merged into: its place, and theirs (x, y: the middle of the patch)."""
    w = kept.grid[1]

    def place(token: int) -> tuple[float, float]:
        return token % w + 0.5, token // w + 0.5

    merged = sorted((kept.merged or {}).items())
    found = [(place(to), [place(s) for s in sources if s != to]) for to, sources in merged]
    return [(to, sources) for to, sources in found if sources]


def data_url(picture: Image.Image, kind: str = "WEBP") -> str:
    """The picture as a URL that holds it."""
    buffer = io.BytesIO()
    picture.save(buffer, kind, quality=QUALITY, method=4)
    return f"data:image/{kind.lower()};base64,{base64.b64encode(buffer.getvalue()).decode()}"


def odd_shapes(report: Report, kept: Sequence[Shot], album: Album) -> bool:
    """Whether a picture's shape differs from its grid's: the processor may then have shown only a part of it."""
    for shot in kept:
        picture, (h, w) = album.picture(shot.question), shot.kept.grid
        if abs(picture.width / picture.height - w / h) > 0.02 * w / h:
            return True
    return False
