"""The table of model classes: where each can be compressed, or why it cannot. `make families` writes it."""

from __future__ import annotations

import json
from dataclasses import dataclass
from functools import cache
from importlib.resources import files


@dataclass(frozen=True)
class ModelClass:
    """One image-text-to-text class of transformers.

    Attributes:
        model_type: of its configuration.
        name: of the class.
        adapter: its own, or `generic`: one that is checked on the very model before it is used; empty if there is none.
        points: where steps can act.
        reason: why it cannot be compressed, or not at all points.
    """

    model_type: str
    name: str
    adapter: str
    points: tuple[str, ...]
    reason: str


@cache
def model_classes() -> tuple[ModelClass, ...]:
    """All classes, by model type."""
    found = json.loads(files("winnow").joinpath("data", "families.json").read_text(encoding="utf-8"))
    return tuple(
        ModelClass(kind, own["class"], own["adapter"], tuple(own["points"]), own["reason"])
        for kind, own in sorted(found.items())
    )
