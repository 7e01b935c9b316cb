"""Training of learned methods of the cache on a frozen text model: a module for each, named after its slug."""

from __future__ import annotations

from pathlib import Path


def trainable() -> tuple[str, ...]:
    """The slugs that `winnow train` knows; a module's `train` makes the file of weights."""
    stems = {path.stem for path in Path(__file__).parent.glob("*.py")} - {"__init__"}
    return tuple(sorted(stem.replace("_", "-") for stem in stems))
