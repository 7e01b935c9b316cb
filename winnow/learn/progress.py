"""The log of a training run: lines on the terminal, the same as JSON lines in a file, curves as a picture."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

from PIL import Image, ImageDraw

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
