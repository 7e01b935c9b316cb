"""Methods are short, and few of their lines only wire them to the engine."""

import ast

import pytest

from winnow.core.registry import METHODS_DIR, built_in

FILES = sorted(path for path in METHODS_DIR.glob("*.py") if path.stem != "__init__")
LONGEST = 120
FASTERVLM = 35
WIRING = 0.15  # of all lines of winnow/methods
WIRES = {"__post_init__", "check", "resolve", "steps", "signals"}


def lines(nodes) -> set[int]:
    return {line for node in nodes for line in range(node.lineno, node.end_lineno + 1)}


def wiring(tree: ast.Module) -> set[int]:
    """The lines of imports, of decorators, and of the bodies of the functions that resolve, list steps or check."""
    found = [node for node in ast.walk(tree) if isinstance(node, ast.Import | ast.ImportFrom)]
    for node in ast.walk(tree):
        if isinstance(node, ast.ClassDef | ast.FunctionDef):
            found += node.decorator_list
        if isinstance(node, ast.FunctionDef) and node.name in WIRES:
            found += node.body
    return lines(found)


def test_what_counts_as_wiring():
    source = (
        "import a\nfrom b import (\n  c,\n)\n@d(1)\nclass E:\n  x = 1\n  def steps(self):\n    y = 1\n    return y\n"
    )
    assert wiring(ast.parse(source)) == {1, 2, 3, 4, 5, 9, 10}


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_a_method_is_one_short_file(path):
    assert len(path.read_text(encoding="utf-8").splitlines()) <= (FASTERVLM if path.stem == "fastervlm" else LONGEST)


def test_few_lines_are_wiring():
    texts = [path.read_text(encoding="utf-8") for path in FILES]
    wires, total = sum(len(wiring(ast.parse(text))) for text in texts), sum(len(text.splitlines()) for text in texts)
    assert wires <= WIRING * total, f"{wires} of {total} lines"


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_a_method_needs_nothing_of_the_engine_and_knows_no_model_family(path):
    tree = ast.parse(path.read_text(encoding="utf-8"))
    modules = {node.module or "" for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}
    modules |= {alias.name for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names}
    own = {m for m in modules if m.startswith("winnow")}
    assert all(m == "winnow.contract" or m.startswith("winnow.parts.") for m in own), own
    assert not {node.attr for node in ast.walk(tree) if isinstance(node, ast.Attribute)} & {"family"}


def test_methods_that_tell_frames_apart_say_that_they_look_across_them():
    """So that a user is told where a model is given the frames of a video as pictures."""
    blind = []
    for path in FILES:
        text = path.read_text(encoding="utf-8")
        if "from winnow.parts.frames import" in text and "    across_frames = True\n" not in text:
            blind.append(path.stem)
    assert not blind


def test_nothing_outside_a_method_decides_by_its_slug():
    """The public face and commands may name methods as examples and defaults; no code asks which one it has."""
    package = METHODS_DIR.parent
    found = []
    for path in sorted(package.rglob("*.py")):
        tree = ast.parse(path.read_text(encoding="utf-8"))
        nodes = ast.walk(tree) if path.parent.name == "core" else _compared(tree)
        for node in nodes if path.parent != METHODS_DIR else ():
            if isinstance(node, ast.Constant) and node.value in built_in():
                found.append(f"{path.relative_to(package)}:{node.lineno} {node.value!r}")
    assert not found


def _compared(tree: ast.Module):
    """What stands in comparisons, `match` statements and keys of tables."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Compare):
            yield from ast.walk(node)
        elif isinstance(node, ast.MatchValue):
            yield node.value
        elif isinstance(node, ast.Dict):
            yield from node.keys
