"""The table of docs/learned-video.md: what trained connectors are worth on clips that they have not seen.

python -m winnow.learn.connectors.table [SLUG …]
"""

from __future__ import annotations

import argparse
import re
from collections.abc import Sequence
from pathlib import Path

from winnow.bench.intervals import rate
from winnow.core.errors import WinnowError
from winnow.learn.connectors import trainable
from winnow.learn.connectors.clips import Frozen
from winnow.learn.connectors.compared import Compared, compared, test_records
from winnow.learn.connectors.fit import recipe_of
from winnow.learn.connectors.recipe import Recipe
from winnow.learn.markdown import table

PAGE = Path(__file__).resolve().parents[3] / "docs" / "learned-video.md"
TABLE = re.compile("(?<=<!-- learned-video:begin -->\n).*?(?=<!-- learned-video:end -->)", re.DOTALL)
COLUMNS = [
    "method",
    "tokens",
    "trained",
    "untrained",
    "frames",
    "all tokens",
    "trained − untrained",
    "trained − frames",
]
PER_TYPE = 300


def cells(found: Compared) -> list[str]:
    """A row of the table."""

    def share(marks: Sequence[bool]) -> str:
        return f"{rate(sum(marks), len(marks)).value:.3f}"

    return [
        f"`{found.name}`",
        f"{found.tokens:.1f}".removesuffix(".0"),
        share(found.trained),
        share(found.untrained),
        f"{share(found.frames)} ({found.frame_tokens})",
        share(found.plain),
        str(found.over_untrained),
        str(found.over_frames),
    ]


def written(page: str, rows: Sequence[Sequence[str]]) -> str:
    """The page with these rows in its table; rows of other methods stay."""
    found = TABLE.search(page)
    if found is None:
        raise WinnowError("the page has no table between <!-- learned-video:begin --> and <!-- learned-video:end -->")
    lines = [line for line in found[0].splitlines() if line.startswith("| `")]
    own = {line.split("`")[1]: [cell.strip() for cell in line.strip("|").split("|")] for line in lines}
    own |= {row[0].strip("`"): list(row) for row in rows}
    return TABLE.sub(lambda _: table(COLUMNS, [own[slug] for slug in sorted(own)]) + "\n", page)


def variants(slug: str) -> list[type[Recipe]]:
    """The recipe, and with it the same weights at other settings."""
    kind = recipe_of(slug)
    return [kind, *(kind.at(**settings) for settings in kind.also)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("slugs", nargs="*", help="default: all that are trained", metavar="SLUG")
    parser.add_argument("--per-type", type=int, default=PER_TYPE, help="questions of each type")
    given = parser.parse_args()
    frozen = Frozen()
    records = test_records(frozen, given.per_type)
    recipes = [own(frozen) for slug in given.slugs or trainable() for own in variants(slug)]
    rows = [cells(compared(own, records)) for own in recipes]
    PAGE.write_text(written(PAGE.read_text(encoding="utf-8"), rows), encoding="utf-8")


if __name__ == "__main__":
    main()
