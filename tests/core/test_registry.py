"""The registry: listing reads source files and imports nothing; what it lists is what the classes say."""

import ast
import importlib.util
import json
import re
import subprocess
import sys
from typing import ClassVar

import pytest

import winnow
from winnow import contract
from winnow.core import registry
from winnow.core.budget import Budget
from winnow.core.errors import WinnowError
from winnow.core.listing import described_class, read_class
from winnow.core.method import Method
from winnow.core.plan import Plan
from winnow.core.registry import (
    METHODS_DIR,
    built_in,
    entries,
    method_class,
    picture_methods,
    register,
    token_methods,
)
from winnow.signals.vision import VisionAttention

BUILTIN = sorted(path.stem for path in METHODS_DIR.glob("*.py") if path.stem != "__init__")


@pytest.fixture(autouse=True)
def _clean_registry(monkeypatch):
    for slug in built_in():
        method_class(slug)
    monkeypatch.setattr(registry, "_extra", dict(registry._extra))
    monkeypatch.setattr(registry, "_classes", dict(registry._classes))


def test_listing_imports_no_torch():
    code = (
        "import sys, winnow\n"
        "assert len(winnow.list_methods()) >= 8\n"
        "heavy = {'torch', 'transformers', 'numpy'} & set(sys.modules)\n"
        "assert not heavy, heavy\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_each_file_is_one_method_named_after_its_slug():
    assert sorted(e.slug.replace("-", "_") for e in entries() if e.module.startswith("winnow.methods.")) == BUILTIN


@pytest.mark.parametrize("stem", BUILTIN)
def test_facts_read_from_the_source_are_those_of_the_class(stem, monkeypatch):
    seen = []

    def record(slug, **facts):
        def keep(cls):
            seen.append((slug, facts, cls))
            return cls

        return keep

    monkeypatch.setattr(contract, "register", record)
    spec = importlib.util.spec_from_file_location(f"reread_{stem}", METHODS_DIR / f"{stem}.py")
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, spec.name, module)
    spec.loader.exec_module(module)
    ((slug, facts, cls),) = seen
    entry = next(e for e in entries() if e.slug == slug)
    assert entry.module == f"winnow.methods.{stem}"
    assert not facts, "family, stages and kind stand in data/systems.json, the source in the first line of the file"
    assert entry.summary == cls.__doc__.strip().split("\n")[0]
    assert method_class(slug).slug == slug
    assert method_class(slug).__module__ == entry.module


@pytest.mark.parametrize("stem", BUILTIN)
def test_settings_read_from_the_source_are_those_of_the_class(stem):
    entry = next(e for e in entries() if e.module == f"winnow.methods.{stem}")
    cls = method_class(entry.slug)
    settings, released = described_class(cls)
    assert {n: s["default"] for n, s in entry.settings.items()} == {n: s["default"] for n, s in settings.items()}
    assert list(entry.settings) == list(cls.settings())
    assert entry.released == released
    assert json.loads(json.dumps(entry.settings)) == entry.settings


def test_what_is_listed_of_a_class_can_be_typed_into_a_plan():
    for entry in entries():
        typed = ",".join(f"{name}={_typed(s['default'])}" for name, s in entry.settings.items())
        assert Plan.of(f"{entry.slug}:{typed}") == Plan.of(entry.slug)


def _typed(value):
    if isinstance(value, list):
        return f"[{','.join(map(_typed, value))}]"
    return str(value).lower() if value is None or isinstance(value, bool) else str(value)


def test_a_source_stands_in_the_first_line_of_its_file():
    for entry in built_in().values():
        path = METHODS_DIR / f"{entry.module.rpartition('.')[2]}.py"
        first = path.read_text(encoding="utf-8").splitlines()[0]
        assert re.fullmatch(r'"""[^()]+ \(arXiv \d{4}\.\d{5}\): .*', first), first
        assert entry.arxiv in first


def test_entries_are_sorted_and_public():
    slugs = [entry.slug for entry in winnow.list_methods()]
    assert slugs == sorted(slugs)
    assert {"fastervlm", "vtc-cls", "hiprune", "divprune", "todre", "visionzip", "fastv", "pyramiddrop"} <= set(slugs)


def _a_method():
    class Mine(Method):
        """Keep what I say."""

        keep: Budget = Budget("30%")
        row: VisionAttention = VisionAttention(layer=-2, heads="sum")
        order: tuple[int, ...] | None = None

        released: ClassVar = {"order": (1, 2), "positions": "compact"}

    return Mine


def test_a_method_from_outside_is_listed():
    register("mine", stages=("decoder",), arxiv="0000.00000")(_a_method())
    (entry,) = [e for e in entries() if e.slug == "mine"]
    assert (entry.family, entry.stages, entry.summary) == ("user", ("decoder",), "Keep what I say.")
    assert entry.arxiv == "0000.00000"
    assert entry.settings == {
        "keep": {"type": "Budget", "default": "30%"},
        "row": {"type": "VisionAttention", "default": "VisionAttention(layer=-2,heads=sum)"},
        "order": {"type": "tuple[int, ...] | None", "default": None},
    }
    assert entry.released == {"order": [1, 2], "positions": "compact"}
    assert method_class("mine").slug == "mine"


def test_a_slug_is_given_once():
    class Other(Method):
        """Another."""

    register("mine")(_a_method())
    register("mine")(_a_method())  # the same class again, as a notebook cell that is run twice
    with pytest.raises(WinnowError, match=r"'mine' is taken by .*Mine; choose another"):
        register("mine")(Other)


def test_the_slug_of_a_built_in_method_is_taken_even_before_it_is_imported(monkeypatch):
    monkeypatch.setattr(registry, "_classes", {})
    with pytest.raises(WinnowError, match=r"'fastervlm' is taken by winnow\.methods\.fastervlm"):
        register("fastervlm")(_a_method())


@pytest.mark.parametrize("facts", [{"kind": "magic"}, {"stages": ("middle",)}, {"stages": ()}])
def test_facts_are_checked(facts):
    with pytest.raises(WinnowError, match="kind is one of"):
        register("mine", **facts)


def test_entry_points_are_loaded_when_a_slug_is_asked_for(monkeypatch):
    class Point:
        name = "plugged"

        def load(self):
            return register("plugged")(_a_method())

    monkeypatch.setattr(
        registry.importlib.metadata, "entry_points", lambda group: [Point()] if group == "winnow.methods" else []
    )
    assert method_class("plugged").slug == "plugged"
    assert "plugged" in [e.slug for e in entries()]


SOURCE = '''
@wn.register("one")
class One(wn.Method):
    """One."""
    keep: wn.Budget = wn.Budget(0, allow_empty=True)
    keys: Signals = (VisionKeys(layer=-1), wn.VisionAttention())
    low: float = -0.5
    on: bool = True
    heard: dict = field(default_factory=dict, metadata={"setting": False})
    slug: ClassVar[str] = "x"
    at = "features"
    released = {"keys": VisionKeys(layer="feature"), "on": False, "positions": "keep"}
'''


def test_settings_as_they_are_written():
    settings, released = read_class(ast.parse(SOURCE).body[0])
    assert settings == {
        "keep": {"type": "Budget", "default": "0?"},
        "keys": {"type": "Signals", "default": ["VisionKeys(layer=-1)", "VisionAttention()"]},
        "low": {"type": "float", "default": -0.5},
        "on": {"type": "bool", "default": True},
    }
    assert released == {"keys": "VisionKeys(layer=feature)", "on": False, "positions": "keep"}


def test_the_command_lists_settings_and_released_without_torch():
    code = (
        "import sys\n"
        "from typer.testing import CliRunner\n"
        "from winnow.cli import app\n"
        "said = CliRunner().invoke(app, ['methods', '--json']).stdout\n"
        "assert not {'torch', 'transformers', 'numpy'} & set(sys.modules)\n"
        "print(said)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    found = {row["slug"]: row for row in json.loads(done.stdout)}
    assert found["hiprune"]["released"] == {"wrap": True, "padding": True, "positions": "compact"}
    assert found["todre"]["released"] is None
    assert found["fastervlm"]["settings"]["row"] == {
        "type": "VisionAttention",
        "default": "VisionAttention(query=auto)",
    }


def test_methods_of_sounds_are_not_offered_for_pictures():
    """Neither by a sweep nor by the search for a plan; on a model that hears they are."""
    of_sounds = {entry.slug for entry in token_methods()} - {entry.slug for entry in picture_methods()}
    beside_videos = {"audio-guided"}
    assert of_sounds == {"a-tome", "audio-pool", "audio-segments", "speechprune"} | beside_videos
    for slug in of_sounds:
        assert method_class(slug).modalities == (("video",) if slug in beside_videos else ("audio",))
    assert all("image" in method_class(entry.slug).modalities for entry in picture_methods())
