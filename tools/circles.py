"""Fail if modules of winnow import one another in a circle, imports for types and imports in functions included.

Usage: python tools/circles.py
"""

from __future__ import annotations

import ast
import graphlib
import sys
from collections.abc import Mapping
from pathlib import Path

PACKAGE = Path(__file__).resolve().parent.parent / "winnow"


def files(package: Path = PACKAGE) -> dict[str, Path]:
    """Dotted name → file of each module; a package goes by its own name."""
    found = {}
    for path in sorted(package.rglob("*.py")):
        parts = path.relative_to(package.parent).with_suffix("").parts
        found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


def modules(package: Path = PACKAGE) -> dict[str, ast.Module]:
    """Dotted name → syntax tree of each module."""
    return {name: ast.parse(path.read_text(encoding="utf-8")) for name, path in files(package).items()}


def imports(trees: Mapping[str, ast.Module]) -> dict[str, set[str]]:
    """Module → modules that it names in an import. `from a import b` names a.b where that is a module, else a."""
    graph: dict[str, set[str]] = {}
    for name, tree in trees.items():
        wanted: set[str] = set()
        for node in ast.walk(tree):
            if isinstance(node, ast.Import):
                wanted |= {alias.name for alias in node.names}
            elif isinstance(node, ast.ImportFrom) and node.module:
                whole = {f"{node.module}.{alias.name}" for alias in node.names}
                wanted |= {full if full in trees else node.module for full in whole}
        graph[name] = {other for other in wanted if other in trees and other != name}
    return graph


def circle(graph: Mapping[str, set[str]]) -> list[str]:
    """Modules of one circle, the first again at the end; empty if there is none."""
    try:
        graphlib.TopologicalSorter(graph).prepare()
    except graphlib.CycleError as error:
        return error.args[1][::-1]
    return []


def main() -> int:
    found = circle(imports(modules()))
    if found:
        print("import circle: " + " → ".join(found))
    return bool(found)


if __name__ == "__main__":
    sys.exit(main())
