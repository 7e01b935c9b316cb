"""The registry: listing reads source files and imports nothing; what it lists is what the classes say."""

from __future__ import annotations

import importlib.util
import subprocess
import sys

import pytest

import winnow
from winnow.core import registry
from winnow.core.errors import WinnowError
from winnow.core.method import Method
from winnow.core.registry import METHODS_DIR, entries, method_class, register

BUILTIN = sorted(path.stem for path in METHODS_DIR.glob("*.py") if path.stem != "__init__")


@pytest.fixture(autouse=True)
def _clean_registry(monkeypatch):
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

    monkeypatch.setattr(registry, "register", record)
    spec = importlib.util.spec_from_file_location(f"reread_{stem}", METHODS_DIR / f"{stem}.py")
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, spec.name, module)
    spec.loader.exec_module(module)
    ((slug, facts, cls),) = seen
    entry = next(e for e in entries() if e.slug == slug)
    assert entry.module == f"winnow.methods.{stem}"
    assert {name: getattr(entry, name) for name in facts} == facts
    assert {"family", "stages", "kind", "arxiv"} <= set(facts)
    assert entry.summary == cls.__doc__.strip().split("\n")[0]
    assert method_class(slug).slug == slug
    assert method_class(slug).__module__ == entry.module


def test_facts_agree_with_the_system_table():
    from winnow.systems import systems

    known = {system.slug: system for system in systems()}
    for entry in entries():
        if entry.module.startswith("winnow.methods.") and entry.slug in known:
            system = known[entry.slug]
            assert (entry.family, entry.stages, entry.kind, entry.arxiv) == (
                system.family,
                system.stages,
                system.kind,
                system.arxiv,
            )


def test_entries_are_sorted_and_public():
    slugs = [entry.slug for entry in winnow.list_methods()]
    assert slugs == sorted(slugs)
    assert {"fastervlm", "vtc-cls", "hiprune", "divprune", "todre", "visionzip", "fastv", "pyramiddrop"} <= set(slugs)


def _a_method():
    class Mine(Method):
        """Keep what I say."""

    return Mine


def test_a_method_from_outside_is_listed():
    register("mine", family="user", stages=("decoder",), arxiv="0000.00000")(_a_method())
    (entry,) = [e for e in entries() if e.slug == "mine"]
    assert (entry.stages, entry.summary, entry.arxiv) == (("decoder",), "Keep what I say.", "0000.00000")
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
