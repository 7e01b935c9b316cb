"""The progress of a training run: running averages, and its log on the terminal, in a file, and as a picture."""

from __future__ import annotations

import json
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from PIL import Image, ImageDraw
from torch import Tensor

from winnow.learn.workers import rank

NOT_SHOWN = ("cpu_seconds", "loss", "answer", "align")


class Log:
    """Appends to `folder`/log.jsonl and prints; silent in all processes but the first."""

    def __init__(self, folder: Path, quiet: bool = False) -> None:
        self.path, self.quiet = folder / "log.jsonl", quiet
        self.active = rank() == 0
        self.cpu = time.process_time()

    def write(self, stage: str, step: int, values: dict[str, float], **more: Any) -> None:
        """One line: the stage, the step in it, CPU seconds of this process, and named values."""
        if not self.active:
            return
        seconds = round(time.process_time() - self.cpu, 1)
        rounded = {name: round(value, 4) for name, value in values.items()}
        row = {"stage": stage, "step": step, "cpu_seconds": seconds, **rounded, **more}
        with self.path.open("a") as file:
            file.write(json.dumps(row) + "\n")
        if not self.quiet:
            text = " ".join(f"{k} {v:.3f}" for k, v in values.items())
            print(f"{stage} {step} [{seconds:.0f} s] {text}", flush=True)  # noqa: T201 — progress is the purpose


class Averages:
    """Running averages of pairs (right, asked) and of losses, forgetting by `decay` a step."""

    def __init__(self, decay: float = 0.97) -> None:
        self.decay = decay
        self.pairs: dict[str, Tensor] = {}
        self.losses: dict[str, float] = {}

    def add(self, name: str, pair: Tensor) -> None:
        self.pairs[name] = self.pairs.get(name, torch.zeros(2)) * self.decay + pair

    def add_loss(self, name: str, value: float) -> None:
        self.losses[name] = self.losses.get(name, value) * self.decay + value * (1 - self.decay)

    def accuracy(self, name: str) -> float:
        right, asked = self.pairs.get(name, torch.zeros(2)).tolist()
        return right / asked if asked else 0.0

    def reach(self, gate: Mapping[str, float]) -> bool:
        """Whether every name of a gate has at least its accuracy; False if there is none."""
        return bool(gate) and all(self.accuracy(name) >= least for name, least in gate.items())

    def values(self) -> dict[str, float]:
        return self.losses | {name: self.accuracy(name) for name, pair in self.pairs.items() if pair[1] > 0}


def read(path: Path) -> list[dict[str, Any]]:
    """The rows of a log file."""
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def draw_curves(log: Path, target: Path, size: tuple[int, int] = (960, 480)) -> None:
    """Draw every logged accuracy (values in 0 … 1) over the run, one colour per name, stages marked, as a PNG."""
    rows = read(log)
    names = sorted({k for row in rows for k, v in row.items() if isinstance(v, float) and k not in NOT_SHOWN})
    width, height = size
    image = Image.new("RGB", size, "white")
    draw = ImageDraw.Draw(image)
    left, top, right, bottom = 40, 10, width - 130, height - 40
    draw.rectangle((left, top, right, bottom), outline="#888888")
    for tick in range(0, 11, 2):
        y = bottom - (bottom - top) * tick / 10
        draw.text((8, y - 6), f"{tick / 10:.1f}", fill="black")
        draw.line((left, y, right, y), fill="#eeeeee")
    at = [left + (right - left) * i / max(1, len(rows) - 1) for i in range(len(rows))]
    free = [0.0, 0.0, 0.0]  # where each line of stage names has room again
    for i, row in enumerate(rows):
        if i == 0 or row["stage"] != rows[i - 1]["stage"]:
            draw.line((at[i], top, at[i], bottom), fill="#cccccc")
            line = next((n for n, x in enumerate(free) if x <= at[i]), 0)
            draw.text((at[i] + 2, bottom + 2 + 11 * line), row["stage"], fill="#555555")
            free[line] = at[i] + 6 + draw.textlength(row["stage"])
    shown = [n for n in names if max(row.get(n, 0) for row in rows) <= 1]
    for number, name in enumerate(shown):
        color = f"hsl({360 * number // len(shown)}, 90%, {35 + 15 * (number % 2)}%)"
        for i in range(1, len(rows)):
            if name in rows[i - 1] and name in rows[i]:  # no line over stages that do not measure it
                heights = [bottom - (bottom - top) * rows[k][name] for k in (i - 1, i)]
                draw.line([(at[i - 1], heights[0]), (at[i], heights[1])], fill=color, width=2)
        draw.text((right + 6, top + 14 * number), name, fill=color)
    image.save(target)
