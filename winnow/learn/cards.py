"""What the cards of models share that were trained in a chain of stages: their size, their training, their files."""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from torch import nn

from winnow.learn.markdown import table
from winnow.learn.progress import read
from winnow.models.quiet import quiet


def weights(model: nn.Module, folder: Path) -> dict[str, int]:
    """Parameters of a model, and bytes of its files."""
    return {
        "parameters": sum(p.numel() for p in model.parameters()),
        "bytes": sum(p.stat().st_size for p in folder.glob("*.safetensors")),
    }


def training(log: str | Path | None, counted: str, names: Sequence[str]) -> dict[str, Any] | None:
    """Steps of each stage, the running accuracies at its end, and what the run counted and took; None without a log.

    Args:
        log: log.jsonl of the run.
        counted: what its examples are counted in.
        names: of the accuracies.
    """
    if log is None:
        return None
    rows = read(Path(log))
    ends = {row["stage"]: row for row in rows}
    stages = [{"stage": row["stage"], "steps": row["step"]} | {n: row.get(n) for n in names} for row in ends.values()]
    seconds = 0.0
    for row, later in zip(rows, [*rows[1:], None], strict=True):
        if later is None or later["cpu_seconds"] < row["cpu_seconds"]:  # the run was stopped here, and went on
            seconds += row["cpu_seconds"]
    return {counted: rows[-1][counted], "cpu_minutes": round(seconds / 60, 1), "stages": stages}


def stage_table(found: dict[str, Any], names: Sequence[str]) -> str:
    """The stages of a training, and its curves."""
    rows = [[stage["stage"], str(stage["steps"]), *(cell(stage[n]) for n in names)] for stage in found["stages"]]
    return table(["stage", "steps logged", *names], rows) + "\n\n![accuracy over the run](curves.png)"


def cell(value: float | None) -> str:
    """A share in a table."""
    return "–" if value is None else f"{value:.3f}"


def write(card: dict[str, Any], page: str, folder: Path) -> None:
    """card.json and README.md."""
    (folder / "card.json").write_text(json.dumps(card, indent=1) + "\n")
    (folder / "README.md").write_text(page)


def main(make: Callable[..., Any], about: str | None, samples: str, count: int) -> None:
    """Make a card from the command line.

    Args:
        about: the help.
        samples: the argument of `make` that says how much is measured, and `count` its default.
    """
    parser = argparse.ArgumentParser(description=about)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--log", type=Path)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(f"--{samples.replace('_', '-')}", type=int, default=count)
    parser.add_argument("--date")
    quiet()
    make(**vars(parser.parse_args()))
