"""Training of learned methods on a frozen model: a module for each, named after its slug."""

from __future__ import annotations

from pathlib import Path

SHARED = {"__init__", "fit", "frozen", "relevance"}


def trainable() -> tuple[str, ...]:
    """The slugs that `winnow train` knows."""
    stems = {path.stem for path in Path(__file__).parent.glob("*.py")} - SHARED
    return tuple(sorted(stem.replace("_", "-") for stem in stems))
