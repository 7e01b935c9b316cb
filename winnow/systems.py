"""The systems that winnow contains or is to contain, and how far its tests prove each of them.

What a system is comes from `data/systems.json`; the source of one that is a method from the first line of its file.
What works is not typed in: `make systems` writes `data/state.json` from the report of a test run. Nothing here imports
torch.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.resources import files
from typing import Any

from winnow.core.registry import built_in

STATES = ("works", "partly", "none")
CHECKS = ("exact", "directional", "model")
BUILDS_NEEDED = 2  # model builds on which a system must have run before it is said to work


@dataclass(frozen=True)
class System:
    """One published system.

    Attributes:
        slug: its name in plans, where it is a method.
        name, title: as published.
        arxiv: identifier of the paper.
        family: letter of its family, A … I.
        stages: where it acts.
        kind: training-free, learned, recipe, benchmark, analysis, survey or position paper.
        extra: not one of the 107 systems of the list, but expected by every user of such a toolkit.
        state: works, partly or none, from the last recorded test run.
        builds: model builds on which its tests ran.
    """

    slug: str
    name: str
    title: str
    arxiv: str
    family: str
    stages: tuple[str, ...]
    kind: str
    extra: bool
    state: str = "none"
    builds: tuple[str, ...] = ()


def _read(name: str) -> Any:
    return json.loads((files("winnow") / "data" / name).read_text(encoding="utf-8"))


@functools.cache
def families() -> dict[str, str]:
    """The letter of each family and what it is."""
    return dict(_read("systems.json")["families"])


@functools.cache
def systems() -> tuple[System, ...]:
    """All systems, in the order of the families."""
    proved, methods = _read("state.json"), built_in()
    return tuple(
        System(
            **{
                "arxiv": methods[row["slug"]].arxiv if row["slug"] in methods else "",
                **row,
                "stages": tuple(row["stages"]),
            },
            state=proved.get(row["slug"], {}).get("state", "none"),
            builds=tuple(proved.get(row["slug"], {}).get("builds", ())),
        )
        for row in _read("systems.json")["systems"]
    )


def prove(checks: Mapping[str, Any]) -> str:
    """The state that passed checks prove.

    Args:
        checks: for each of `CHECKS`, what passed: tests for `exact` and `directional`, builds for `model`.

    A system works when an exact and a directional check passed and it ran on at least two model builds.
    """
    exact, directional, builds = (checks.get(kind) or () for kind in CHECKS)
    if exact and directional and len(builds) >= BUILDS_NEEDED:
        return "works"
    return "partly" if exact or directional or builds else "none"
