"""Write the table of systems from the report of a test run, or check that the committed one agrees with it.

    python tools/systems.py write REPORT     winnow/data/state.json, docs/systems.md, and the matrix in README.md
    python tools/systems.py check REPORT     exit 1 if they differ from what the report proves

REPORT is what `pytest --system-report REPORT` wrote.
"""

from __future__ import annotations

import json
import re
import sys
from collections import Counter
from pathlib import Path
from typing import Any

from winnow.core.registry import entries
from winnow.learn import markdown
from winnow.systems import STATES, families, prove, systems

ROOT = Path(__file__).resolve().parent.parent
STATE = ROOT / "winnow" / "data" / "state.json"
TABLE = ROOT / "docs" / "systems.md"
README = ROOT / "README.md"
MATRIX = re.compile("(?<=<!-- support:begin -->\n).*?(?=<!-- support:end -->)", re.DOTALL)
SIGN = {"works": "✔ works", "partly": "◐ partly", "none": "–"}


def state_of(report: dict[str, dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """What each system's passed checks prove; systems without any are left out."""
    found = {}
    for slug, checks in sorted(report.items()):
        found[slug] = {
            "state": prove(checks),
            "exact": bool(checks.get("exact")),
            "directional": bool(checks.get("directional")),
            "builds": sorted(checks.get("model", ())),
        }
    return found


def table(proved: dict[str, dict[str, Any]]) -> str:
    """docs/systems.md."""
    states = {system.slug: proved.get(system.slug, {}).get("state", "none") for system in systems()}
    counts = Counter(states.values())
    lines = [
        "# Systems",
        "",
        "Written by `make systems` from the report of a test run; nothing here is typed in. A system **works** when",
        "an exact check and a directional check of it passed and it ran on at least two model builds; **partly** when",
        "some of that is so. ◦ marks systems outside the list of 107 that users of such a toolkit expect.",
        "",
        "Now: " + ", ".join(f"{counts[state]} {state}" for state in STATES) + f", of {len(states)}.",
    ]
    head = ("slug", "system", "arXiv", "stages", "kind", "state", "ran on")
    for letter, title in families().items():
        rows = []
        for s in systems():
            if s.family == letter:
                slug = f"`{s.slug}`" + (" ◦" if s.extra else "")
                paper = f"[{s.arxiv}](https://arxiv.org/abs/{s.arxiv})"
                builds = ", ".join(proved.get(s.slug, {}).get("builds", ()))
                rows.append((slug, s.name, paper, ", ".join(s.stages), s.kind, SIGN[states[s.slug]], builds))
        lines += ["", f"## {letter}. {title}", "", markdown.table(head, rows)]
    return "\n".join(lines) + "\n"


def matrix(proved: dict[str, dict[str, Any]]) -> str:
    """Methods by model builds, a mark where a test of the method on that build passed; those of the cache apart."""
    tables = [_marks(proved, of_cache) for of_cache in (False, True)]
    found = [table for table in tables if table]
    return "\n\nMethods of the KV cache:\n\n".join(found) + "\n" if found else f"{NOTHING}\n"


NOTHING = "No method has run on a model in the recorded tests."


def _marks(proved: dict[str, dict[str, Any]], of_cache: bool) -> str:
    methods = [entry for entry in entries() if entry.of_cache == of_cache]
    known = {entry.slug: proved.get(entry.slug, {"state": "none", "builds": ()}) for entry in methods}
    builds = sorted({build for row in known.values() for build in row["builds"]})
    if not builds:
        return ""
    rows = []
    for slug, row in known.items():
        rows.append((f"`{slug}`", row["state"], *("✔" if build in row["builds"] else "" for build in builds)))
    return markdown.table(("method", "state", *(f"`{build}`" for build in builds)), rows)


def outputs(proved: dict[str, dict[str, Any]]) -> dict[Path, str]:
    """What each generated file should hold."""
    readme = README.read_text(encoding="utf-8")
    if not MATRIX.search(readme):
        raise SystemExit("README.md has lost the marks <!-- support:begin --> and <!-- support:end -->.")
    return {
        STATE: json.dumps(proved, indent=1, ensure_ascii=False) + "\n",
        TABLE: table(proved),
        README: MATRIX.sub(lambda _: matrix(proved), readme),
    }


def main(arguments: list[str]) -> int:
    if len(arguments) != 2 or arguments[0] not in ("write", "check"):
        print(__doc__, file=sys.stderr)
        return 2
    try:
        report = json.loads(Path(arguments[1]).read_text(encoding="utf-8"))
    except FileNotFoundError:
        print(f"There is no report at {arguments[1]}; run `make test` first.", file=sys.stderr)
        return 2
    unknown = set(report) - {system.slug for system in systems()}
    if unknown:
        print(f"The report names unknown systems: {', '.join(sorted(unknown))}.", file=sys.stderr)
        return 2
    wanted = outputs(state_of(report))
    if arguments[0] == "write":
        for path, text in wanted.items():
            path.write_text(text, encoding="utf-8")
        return 0
    stale = [p for p, text in wanted.items() if not p.exists() or p.read_text(encoding="utf-8") != text]
    for path in stale:
        print(f"{path.relative_to(ROOT)} differs from what the tests prove; run `make systems`.", file=sys.stderr)
    return 1 if stale else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
