"""What every test shares: no network, one thread, workers, and the report of what the tests prove of each system."""

from __future__ import annotations

import gc
import json
import os
import sys
from collections import defaultdict
from pathlib import Path
from types import SimpleNamespace

import pytest
from jaxtyping import install_import_hook

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("OMP_NUM_THREADS", "1")

# While tests run, every call in these rooms checks its arguments and its result against their annotated shapes.
# WINNOW_CHECK_SHAPES=0 switches it off, for tests that time something. Modules without shapes are left
# alone, because the check of each call costs time.
PACKAGE = Path(__file__).resolve().parent.parent / "winnow"
CHECKED = [
    f"winnow.{room}.{path.stem}"
    for room in ("core", "parts", "signals", "methods", "cache", "engine")
    for path in sorted((PACKAGE / room).glob("*.py"))
    if "from jaxtyping import" in path.read_text(encoding="utf-8")
]
if CHECKED and os.environ.get("WINNOW_CHECK_SHAPES", "1") != "0":
    from shapes import check_what_has_a_shape

    check_what_has_a_shape()
    install_import_hook(CHECKED, "shapes.checked")


@pytest.fixture(autouse=True)
def _seed():
    """What a test draws does not depend on which tests ran before it in the same process."""
    if torch := sys.modules.get("torch"):  # tests of this file itself do without it
        seed(torch)


def seed(torch):
    """As `torch.manual_seed(0)`, which writes a traceback down for each kind of accelerator that is not there."""
    if torch.accelerator.is_available():
        torch.manual_seed(0)
    else:
        torch.default_generator.manual_seed(0)


@pytest.fixture(scope="session", autouse=True)
def _default_configurations():
    if CHECKED:
        from quick import remember_default_configurations  # here, so that only who runs tests imports transformers

        remember_default_configurations()


def pytest_addoption(parser):
    parser.addoption("--system-report", metavar="FILE", help="write which marked checks of which systems passed")


def pytest_configure(config):
    if not hasattr(config, "workerinput"):  # under xdist the controller sees the reports of all workers
        config.pluginmanager.register(SystemReport(config.getoption("--system-report")), "system-report")


def pytest_collection_modifyitems(items):
    """Attach (slug, check, build) of `@pytest.mark.system` to the reports of a test."""
    from winnow.systems import CHECKS, systems

    slugs = {system.slug for system in systems()}
    for item in items:
        for mark in item.iter_markers("system"):
            given = item.callspec.params if hasattr(item, "callspec") else {}
            slug, check = mark.args if len(mark.args) == 2 else (None, None)
            build = mark.kwargs.get("build", given.get("build")) if check == "model" else ""
            if slug not in slugs or check not in CHECKS or build is None:
                raise pytest.UsageError(
                    f"{item.nodeid}: mark.system{mark.args} takes a slug of winnow/data/systems.json and one of "
                    f"{CHECKS}; 'model' needs a build, from the mark or from a parameter `build` of the test"
                )
            item.user_properties.append(("system", [slug, check, build]))


@pytest.hookimpl(wrapper=True)
def pytest_collection():
    """What is imported here stays: to look through it for garbage is a quarter of what collection takes, and would
    take a second whenever all that lives is looked through while tests run.
    """
    gc.disable()
    try:
        return (yield)
    finally:
        gc.freeze()
        gc.enable()


@pytest.hookimpl(wrapper=True)
def pytest_collection_finish(session):
    """With `--dist loadgroup` a worker gets whole files, and whole groups: what they share is then made once.

    pytest-xdist reads the group of a test behind an @ of its id, and pytest 9.2 no longer lets it write there
    (https://github.com/pytest-dev/pytest-xdist/issues/1386): here it is shown ids of ours.
    """
    if not session.config.getoption("loadgroup", False):
        return (yield)
    items, session.items = session.items, [SimpleNamespace(nodeid=told(item)) for item in session.items]
    try:
        return (yield)
    finally:
        session.items = items


def told(item) -> str:
    """The id of a test, with what it is scheduled by."""
    mark = item.get_closest_marker("xdist_group")
    end = "@" + (item.nodeid.partition("::")[0] if mark is None else mark.args[0])
    return item.nodeid.removesuffix(end) + end


class SystemReport:
    """Collects the marks of the tests whose every phase passed."""

    def __init__(self, path: str | None):
        self.path = path
        self.marks: dict[str, list[list[str]]] = {}
        self.unproved: set[str] = set()

    def pytest_runtest_logreport(self, report):
        if marks := [value for name, value in report.user_properties if name == "system"]:
            self.marks[report.nodeid] = marks
        if not report.passed:
            self.unproved.add(report.nodeid)

    def pytest_sessionfinish(self):
        if self.path is None:
            return
        found: dict[str, dict[str, list[str]]] = defaultdict(lambda: defaultdict(list))
        for test in sorted(set(self.marks) - self.unproved):
            for slug, check, build in self.marks[test]:
                evidence = build if check == "model" else test
                if evidence not in found[slug][check]:
                    found[slug][check].append(evidence)
        Path(self.path).parent.mkdir(parents=True, exist_ok=True)
        Path(self.path).write_text(json.dumps(found, indent=1, sort_keys=True) + "\n", encoding="utf-8")
