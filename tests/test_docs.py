"""The pages of the methods: written from the registry, complete, and up to date."""

from __future__ import annotations

import importlib.util
import json
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest

from tests.bench import synthetic
from winnow.core.errors import WinnowError
from winnow.core.method import Method
from winnow.core.plan import Plan
from winnow.core.registry import entries, method_class
from winnow.engine.compress import DEFAULT

ROOT = Path(__file__).resolve().parent.parent
BUILT_IN = [entry for entry in entries() if entry.module.startswith("winnow.methods.")]


@pytest.fixture(scope="module")
def docs() -> ModuleType:
    spec = importlib.util.spec_from_file_location("docs_tool", ROOT / "tools" / "docs.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def elsewhere(docs: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The tool with its outputs in a folder of the test."""
    monkeypatch.setattr(docs, "ROOT", tmp_path)
    monkeypatch.setattr(docs, "PAGES", tmp_path / "methods")
    monkeypatch.setattr(docs, "ON_PICTURES", tmp_path / "pictures.md")
    monkeypatch.setattr(docs, "MEASURED", tmp_path / "measured.json")
    monkeypatch.setattr(docs, "PICTURES", tmp_path / "images" / "methods")
    readme = tmp_path / "README.md"
    readme.write_text("before\n<!-- measured:begin -->\nold\n<!-- measured:end -->\nafter\n", encoding="utf-8")
    monkeypatch.setattr(docs, "README", readme)
    return tmp_path


def test_the_committed_pages_are_what_the_registry_says(docs: ModuleType, capsys: pytest.CaptureFixture[str]) -> None:
    assert docs.main(["check"]) == 0, capsys.readouterr().err


def test_check_finds_what_is_changed_missing_or_left_over(
    docs: ModuleType, elsewhere: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert docs.main(["write"]) == 0
    assert docs.main(["check"]) == 0
    lines = (elsewhere / "README.md").read_text(encoding="utf-8").splitlines()
    assert (lines[0], lines[-1]) == ("before", "after")
    assert "old" not in lines
    (elsewhere / "methods" / "fastv.md").write_text("other")
    (elsewhere / "methods" / "divprune.md").unlink()
    (elsewhere / "methods" / "gone.md").write_text("a method that is no more")
    assert docs.main(["check"]) == 1
    said = capsys.readouterr().err
    assert all(name in said for name in ("fastv.md", "divprune.md", "gone.md"))
    assert "hiprune.md" not in said
    assert docs.main(["write"]) == 0
    assert not (elsewhere / "methods" / "gone.md").exists()
    assert docs.main(["check"]) == 0
    assert docs.main(["other"]) == 2


@pytest.mark.parametrize("entry", BUILT_IN, ids=lambda entry: entry.slug)
def test_every_method_says_what_its_page_needs(docs: ModuleType, entry: object) -> None:
    cls: type[Method] = method_class(entry.slug)  # type: ignore[attr-defined]
    parts = docs.told(cls)
    for name in ("idea", *docs.FACTS):
        assert parts.get(name, "").strip(" ."), f"the docstring of {cls.__module__} does not say: {name}"
    assert set(docs.arguments(cls)) == set(cls.settings()), "Args of the class docstring and its settings differ"
    if cls.identity is not None:
        plan = re.search(r"`(.*)`", docs.identity(cls))
        assert plan is not None
        assert Plan.of(plan[1]).methods == (cls.configured(**cls.identity),)


def test_a_docstring_is_taken_apart_at_its_labels(docs: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    module = ModuleType("made_up")
    module.__doc__ = """Name: keep
    things.

    Looks at: a row,
    and more. Cost: O(V).

    A formula.

    Ends here. Departs from the paper: nothing. Departs from the released code: a | b.
    """
    module.__doc__ = module.__doc__.replace("keep\n    things.", "keep things.")
    monkeypatch.setattr(docs.importlib, "import_module", lambda name: module)
    assert docs.told(Method) == {
        "idea": "keep things.",
        "how": "A formula.\n\nEnds here.",
        "Looks at": "a row, and more.",
        "Cost": "O(V).",
        "Departs from the paper": "nothing.",
        "Departs from the released code": "a | b.",
    }
    assert docs.table(["a | <b>"], [[0.5]]) == "| a \\| &lt;b> |\n|---|\n| 0.500 |"


@pytest.fixture
def named(docs: ModuleType, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], None]:
    """Makes the rule of the default method name this one."""

    def name(slug: str) -> None:
        standing = docs.default_method.Standing(slug, (0.5,), 0.001, "")
        monkeypatch.setattr(docs.default_method, "load", lambda path: [standing])

    return name


def test_measured_rows_and_pictures_come_from_a_store(
    docs: ModuleType, elsewhere: Path, named: Callable[[str], None], capsys: pytest.CaptureFixture[str]
) -> None:
    store = elsewhere / "runs.sqlite"
    synthetic.accuracy(store, questions=26, budgets=(64, 16), methods=("fastervlm", "visionzip"), pictures=2)
    named("another")
    assert docs.main(["measure", str(store)]) == 1
    assert f"The default method is {DEFAULT}" in capsys.readouterr().err
    named(DEFAULT)
    assert docs.main(["measure", str(store)]) == 0
    found = json.loads((elsewhere / "measured.json").read_text(encoding="utf-8"))
    assert found["command"] == "winnow bench --questions 260"
    page = (elsewhere / "methods" / "fastervlm.md").read_text(encoding="utf-8")
    row = next(r for r in found["rows"] if (r["label"], r["budget"]) == ("fastervlm", "64"))
    assert f"| fastervlm 64 | 64 | 76 | {100 * row['accuracy']:.1f} [" in page
    assert "| full | 256 | 268 |" in page
    assert "```sh\nwinnow bench --questions 260\n```" in page
    assert "../images/methods/fastervlm.webp" in page
    assert (elsewhere / "images" / "methods" / "fastervlm.webp").stat().st_size > 1000
    assert "## Measured" not in (elsewhere / "methods" / "fastv.md").read_text(encoding="utf-8")
    assert docs.main(["check"]) == 0


def test_figures_of_the_twin_stand_beside_the_models(
    docs: ModuleType, elsewhere: Path, named: Callable[[str], None]
) -> None:
    named(DEFAULT)
    stores = [elsewhere / f"{name}.sqlite" for name in ("shipped", "twin", "other")]
    for store, methods, questions in zip(
        stores, (("fastervlm", "visionzip"), ("fastervlm",), ("fastervlm",)), (26, 26, 20), strict=True
    ):
        synthetic.accuracy(store, questions=questions, budgets=(64, 16), methods=methods, pictures=2)
    assert docs.main(["measure", *map(str, stores[:2])]) == 0
    found = json.loads((elsewhere / "measured.json").read_text(encoding="utf-8"))
    own = next(row for row in found["twin"]["rows"] if (row["label"], row["budget"]) == ("fastervlm", "64"))
    page = (elsewhere / "pictures.md").read_text(encoding="utf-8")
    lines = {line.split("|")[1].strip(): line.split("|") for line in page.splitlines() if line.startswith("|")}
    assert lines["method"][-3:-1] == [" right, twin, % ", " retained, twin, % "]
    assert lines["fastervlm 64"][-3].strip().startswith(f"{100 * own['accuracy']:.1f} [")
    assert lines["fastervlm 64"][-2].strip().startswith(f"{100 * own['retained']:.1f} [")
    assert [cell.strip() for cell in lines["visionzip 64"][-3:-1]] == ["–", "–"]  # the twin was not asked
    assert docs.main(["check"]) == 0
    with pytest.raises(WinnowError, match="other questions"):
        docs.main(["measure", str(stores[0]), str(stores[2])])


def test_what_differs_on_the_twin_is_named(docs: ModuleType) -> None:
    def row(label: str, low: float, high: float) -> dict[str, object]:
        return {
            "label": label,
            "budget": "64",
            "retained": (low + high) / 2,
            "retained_low": low,
            "retained_high": high,
        }

    rows = [row("a", 0.9, 1.0), row("b", 0.5, 0.6), row("c", 0.7, 0.8), row("d", 0.1, 0.2)]
    twin = {(r["label"], "64"): r for r in (row("a", 0.8, 0.89), row("b", 0.61, 0.7), row("c", 0.75, 0.9))}
    assert docs.differing(rows, twin) == (
        "Retains more, the intervals apart: on the shipped model `a`; on the twin `b`."
    )
    assert docs.differing(rows[2:], twin) == ""


@pytest.mark.skipif(importlib.util.find_spec("mkdocs") is None, reason="needs the extra docs: pip install .[docs]")
def test_the_site_loads_nothing_from_elsewhere(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "mkdocs", "build", "--quiet", "--site-dir", str(tmp_path / "site")]
    subprocess.run(command, cwd=ROOT, check=True, capture_output=True, timeout=120)
    pages = sorted((tmp_path / "site").rglob("*.html"))
    assert {f"{entry.slug}.html" for entry in BUILT_IN} <= {page.name for page in pages}
    loaded = re.compile(r"<(?:script|img|iframe|source)\b[^>]*\bsrc=[\"']?(\S+?)[\"'>\s]|<link\b([^>]*)>")
    for page in pages:
        for source, link in loaded.findall(page.read_text(encoding="utf-8")):
            assert not source.startswith(("http:", "https:", "//")), (page.name, source)
            assert "http" not in link or "rel=canonical" in link.replace('"', ""), (page.name, link)
    for sheet in (tmp_path / "site").rglob("*.css"):
        assert not re.search(r"(?:url\(|@import)\s*[\"']?(?:https?:)?//", sheet.read_text(encoding="utf-8")), sheet.name
