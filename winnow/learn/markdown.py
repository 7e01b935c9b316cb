"""The Markdown table, of the card and of all generated pages."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any


def table(head: Iterable[str], rows: Iterable[Iterable[Any]]) -> str:
    """A Markdown table; floats get three decimals, and no text breaks out of its cell."""
    lines = [[str(name) for name in head]]
    lines.append(["---"] * len(lines[0]))
    lines += [[f"{v:.3f}" if isinstance(v, float) else str(v) for v in row] for row in rows]
    return "\n".join(
        f"|{'|'.join(line)}|" if n == 1 else f"| {' | '.join(map(_escaped, line))} |" for n, line in enumerate(lines)
    )


def _escaped(text: str) -> str:
    return text.replace("|", "\\|").replace("<", "&lt;")


def percents(shares: Iterable[str]) -> list[str]:
    """ "0.125" → "12.5 %"."""
    return [f"{100 * float(share):g} %" for share in shares]
