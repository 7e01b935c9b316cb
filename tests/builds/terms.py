"""The settings of a tiny language model in the terms of a configuration that has names of its own for them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any


def in_terms(text: dict[str, Any], *, without: Sequence[str] = (), **names: str) -> dict[str, Any]:
    """The settings `text`, with those of `names` (own name → name in `text`) renamed and those of `without` left out.

    A name in `text` can have several own names (an encoder's and a decoder's depth).
    """
    moved = {*without, *names.values()}
    kept = {name: value for name, value in text.items() if name not in moved}
    return kept | {own: text[name] for own, name in names.items()}
