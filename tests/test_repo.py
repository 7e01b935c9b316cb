"""What holds for the repository as a whole: what its files may say and import, and that its documentation runs."""

from __future__ import annotations

import ast
import functools
import importlib
import importlib.util
import os
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

import winnow
from winnow.core import registry
from winnow.testing import check_method

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = ROOT / "winnow"
ENVIRONMENT = {**os.environ, "PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}

# Rooms, lowest first. A module imports from its own room and from lower ones.
RANKS = [
    {"core", "children", "media_headers", "_version", "__version__"},
    {"media", "overlay", "parts", "signals", "systems", "model_classes", "world"},
    {"contract", "reference", "video"},
    {"methods", "models", "cache"},
    {"engine"},
    {"bench", "testing", "watch"},
    {"tuning"},
    {"learn"},  # the card of a model shows what the bench measured
    {"serve"},
    {"studio"},  # its bodies and plans are checked as those of the server
    {"cli"},
]
RANK = {room: rank for rank, rooms in enumerate(RANKS) for room in rooms}

LINKED = {
    "127.0.0.1",
    "arxiv.org",
    "github.com",
    "huggingface.co",
    "keepachangelog.com",
    "scripts.sil.org",
    "semver.org",
    "www.apache.org",
    "www.w3.org",  # the name space of SVG, not a link
}


def files() -> list[Path]:
    """What is, or is about to be, under version control; everything but generated folders where git is absent."""
    command = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    if done.returncode == 0:
        return [path for name in sorted(set(done.stdout.split("\0"))) if name and (path := ROOT / name).is_file()]
    skipped = {
        ".git",
        ".venv",
        ".venv-newest",
        "out",
        "runs",
        "build",
        "dist",
        ".ruff_cache",
        ".mypy_cache",
        ".pytest_cache",
        "__pycache__",
    }
    return [path for path in sorted(ROOT.rglob("*")) if path.is_file() and not skipped & set(path.parts)]


@functools.cache
def texts() -> dict[str, str]:
    found = {}
    for path in files():
        try:
            found[str(path.relative_to(ROOT))] = path.read_text(encoding="utf-8")
        except UnicodeDecodeError:
            continue
    return found


@functools.cache
def sources() -> dict[str, ast.Module]:
    return {
        name: ast.parse(text) for name, text in texts().items() if name.startswith("winnow/") and name.endswith(".py")
    }


def test_the_walk_sees_the_repository():
    assert {"README.md", "winnow/core/reduction.py", "tests/test_repo.py", "Makefile"} <= set(texts())


def test_no_file_names_a_machine_or_a_package_registry():
    machine = re.compile(r"(?<![\w.])/(?:work|home|root|Users|mnt)/\w|\b[\w-]+\.(?:internal|corp|lan)\b")
    registry = re.compile(
        r"index-url|PIP_INDEX|\b(?:pypi|artifactory)\b|\bregistry\.\w+\.(?:com|org|net|io)\b", re.IGNORECASE
    )
    said = {}
    for name, text in texts().items():
        found = [m.group() for pattern in (machine, registry) for m in pattern.finditer(text)]
        if found and name != "tests/test_repo.py":
            said[name] = found
    assert not said


def test_links_lead_to_known_places():
    unknown = {}
    for name, text in texts().items():
        if name.startswith("tests/") or "LICENSE" in name:
            continue
        hosts = set(re.findall(r"https?://([\w.-]+)", text)) - LINKED
        if hosts:
            unknown[name] = hosts
    assert not unknown


def test_python_files_are_at_most_500_lines():
    long = {name: n for name, text in texts().items() if name.endswith(".py") and (n := text.count("\n")) > 500}
    assert not long


def test_the_package_has_no_assert_statement():
    found = [
        f"{name}:{node.lineno}"
        for name, tree in sources().items()
        for node in ast.walk(tree)
        if isinstance(node, ast.Assert)
    ]
    assert not found


def test_nothing_in_the_package_unpickles():
    """The one exception is a training run that reads back what it wrote, tensors only."""
    found = []
    for name, tree in sources().items():
        for node in ast.walk(tree):
            if isinstance(node, ast.Import | ast.ImportFrom):
                modules = [a.name for a in node.names] if isinstance(node, ast.Import) else [node.module or ""]
                if {m.split(".")[0] for m in modules} & {"pickle", "cPickle", "dill", "joblib", "shelve", "marshal"}:
                    found.append(f"{name}:{node.lineno} imports {modules}")
            elif isinstance(node, ast.Call) and ast.unparse(node.func) == "torch.load":
                weights_only = any(k.arg == "weights_only" and ast.unparse(k.value) == "True" for k in node.keywords)
                if not (weights_only and name.startswith("winnow/learn/")):
                    found.append(f"{name}:{node.lineno} calls torch.load")
            elif isinstance(node, ast.keyword) and node.arg == "allow_pickle" and ast.unparse(node.value) != "False":
                found.append(f"{name}:{node.lineno} allows pickle")
    assert not found


def test_trust_in_remote_code_is_never_assumed():
    found = [
        f"{name}:{node.value.lineno}"
        for name, tree in sources().items()
        for node in ast.walk(tree)
        if isinstance(node, ast.keyword) and node.arg == "trust_remote_code" and ast.unparse(node.value) == "True"
    ]
    assert not found


def room(name: str) -> str:
    """`cli_run` and its like are one room in several files."""
    return "cli" if name.startswith("cli_") else name


def imported(name: str, tree: ast.Module) -> set[str]:
    """The winnow modules that a file imports, at the top or in a function, for types or for good."""
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{name}:{node.lineno} imports relatively"
            if node.module == "winnow":
                found |= {f"winnow.{alias.name}" for alias in node.names}
            else:
                found.add(node.module or "")
    return {module for module in found if module.startswith("winnow.")}


def test_dependencies_run_one_way():
    wrong = []
    for name, tree in sources().items():
        here = room(Path(name).with_suffix("").parts[1])
        if here == "__init__":  # the public face, which imports late
            continue
        assert here in RANK, f"{name}: say in RANKS where this room stands"
        for module in imported(name, tree):
            there = room(module.split(".")[1])
            if there != here and RANK[there] >= RANK[here]:
                wrong.append(f"{name} imports {module}")
    assert not wrong


def circles():
    """tools/circles.py, which `make lint` runs."""
    spec = importlib.util.spec_from_file_location("circles", ROOT / "tools" / "circles.py")
    made = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(made)
    return made


def test_no_module_imports_itself_by_way_of_others():
    """Imports for types, imports in functions and the public face included."""
    tool = circles()
    trees = sources()
    graph = tool.imports({name: trees[str(path.relative_to(ROOT))] for name, path in tool.files().items()})
    assert {"winnow.core.plan", "winnow.core.method"} <= graph["winnow.engine.compress"]
    assert tool.circle(graph) == []
    assert "tools/circles.py" in (ROOT / "Makefile").read_text().split("lint:")[1].split("\n\n")[0]


@pytest.mark.parametrize(
    ("a", "b"),
    [
        ("import pack.b", "import pack.a"),
        ("from pack.b import name", "def f():\n    from pack import a"),
        ("from pack import b", "if TYPE_CHECKING:\n    from pack.a import name"),
    ],
)
def test_circles_of_each_kind_are_found(tmp_path, a, b):
    package = tmp_path / "pack"
    package.mkdir()
    for name, text in (("__init__", ""), ("a", a), ("b", b)):
        (package / f"{name}.py").write_text(text)
    tool = circles()
    found = tool.circle(tool.imports(tool.modules(package)))
    assert set(found) == {"pack.a", "pack.b"}
    (package / "b.py").write_text("")
    assert tool.circle(tool.imports(tool.modules(package))) == []


# Strings outside `methods/` and `models/` that name one of them, and why they may. Docstrings and comments may anyway.
MAY_NAME = {
    "winnow/engine/compress.py": "the default method, the one constant",
    "winnow/watch/__init__.py": "the default plan of a stream, the one constant",
    "winnow/core/plan.py": "an example of a plan, in messages",
    "winnow/reference/doubts.py": "an example of a Hub id, in a warning",
    "winnow/learn/generation/deep_forcing.py": "the toy that writes frames is what one method is tried on",
    "winnow/learn/controls.py": "an experiment of the reference model's card is about one method",
}


def strings(tree: ast.Module) -> list[ast.Constant]:
    """String literals that are no docstrings."""
    prose = {
        id(node.body[0].value)
        for node in ast.walk(tree)
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef)
        and node.body
        and isinstance(node.body[0], ast.Expr)
    }
    return [
        node
        for node in ast.walk(tree)
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in prose
    ]


def test_nothing_outside_a_method_names_it_and_nothing_outside_the_adapters_names_a_family():
    from winnow.models.families import FAMILIES

    methods = [entry.slug for entry in winnow.list_methods() if entry.family != "user"]
    word = re.compile("|".join(rf"(?<![\w-]){re.escape(name)}(?!\w)" for name in (*methods, *FAMILIES)))
    found: dict[str, list[str]] = {}
    for name, tree in sources().items():
        if Path(name).parts[1] in ("methods", "models") or name == "winnow/__init__.py":  # which exports their classes
            continue
        if name.startswith(("winnow/learn/pruners/", "winnow/learn/connectors/")):  # the training of one method each
            continue
        named = [f"{node.lineno}: {node.value!r}" for node in strings(tree) if word.search(node.value)]
        named += [module for module in imported(name, tree) if module.startswith("winnow.methods.")]
        if named:
            found[name] = named
    assert {name: named for name, named in found.items() if name not in MAY_NAME} == {}
    assert set(found) == set(MAY_NAME), "a reason without a string: take it out"
    assert len(found["winnow/engine/compress.py"]) == 1


def python(code: str, timeout: int = 120) -> str:
    """What a fresh interpreter prints."""
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=timeout, env=ENVIRONMENT
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_importing_winnow_and_listing_imports_neither_torch_nor_transformers():
    heavy = "sorted({'torch', 'transformers', 'numpy', 'PIL', 'rich'} & set(sys.modules))"
    code = "import sys, winnow, winnow.systems, winnow.cli; winnow.list_methods(); winnow.systems.systems()"
    assert python(f"{code}; print({heavy})").strip() == "[]"


def test_importing_all_of_winnow_patches_nothing():
    code = """
import importlib, pkgutil
import torch, torch.nn.functional, transformers, PIL.Image
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers import cache_utils, generation, modeling_utils
from transformers.models import clip, llama, llava, llava_next, qwen2_5_vl
import transformers.models.llama.modeling_llama, transformers.models.llava.modeling_llava
import transformers.models.llava_next.modeling_llava_next, transformers.models.qwen2_5_vl.modeling_qwen2_5_vl

def owners():
    yield from (torch, torch.nn.functional, torch.nn.Module, torch.Tensor, PIL.Image, PIL.Image.Image)
    yield from (cache_utils, modeling_utils, transformers.PreTrainedModel, transformers.GenerationMixin)
    for family in ("llama.modeling_llama", "llava.modeling_llava", "llava_next.modeling_llava_next",
                   "qwen2_5_vl.modeling_qwen2_5_vl"):
        module = importlib.import_module("transformers.models." + family)
        yield module
        yield from (value for value in vars(module).values() if isinstance(value, type))

def seen():
    held = {(i, name): id(value) for i, owner in enumerate(owners()) for name, value in vars(owner).items()
            if callable(value) or isinstance(value, (int, float, str, dict))}
    return held, torch.get_num_threads(), torch.random.get_rng_state().sum().item()

before = seen()
import winnow
for module in pkgutil.walk_packages(winnow.__path__, "winnow."):
    importlib.import_module(module.name)
after = seen()
assert before[1:] == after[1:], "threads or the global generator changed"
changed = [key for key, value in before[0].items() if after[0].get(key) != value]
assert not changed, changed
print("same")
"""
    assert python(code, timeout=300).strip() == "same"


def project() -> dict:
    return tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]


def test_the_version_is_said_once_and_the_changelog_knows_it():
    assert re.fullmatch(r"\d+\.\d+\.\d+((a|b|rc|\.dev)\d+)?", winnow.__version__)
    assert project()["dynamic"] == ["version"]
    changes = (ROOT / "CHANGELOG.md").read_text()
    assert "## [Unreleased]" in changes or f"## [{winnow.__version__}]" in changes


def pins(name: str) -> dict[str, str]:
    return dict(line.split("==") for line in (ROOT / name).read_text().splitlines() if "==" in line)


def test_every_dependency_is_pinned_within_its_range():
    from packaging.requirements import Requirement

    oldest, newest = pins("constraints.txt"), pins("constraints.txt") | pins("constraints-newest.txt")
    wanted = [*project()["dependencies"], *project()["optional-dependencies"]["dev"]]
    for requirement in map(Requirement, wanted):
        assert requirement.name in oldest, f"{requirement.name} is not in constraints.txt"
        for pinned in (oldest, newest):
            assert requirement.specifier.contains(pinned[requirement.name]), requirement


def test_the_tests_run_on_both_ends_of_the_versions_of_transformers_that_are_supported():
    """The dependency, the two environments, and what `compress` takes say the same."""
    from packaging.requirements import Requirement
    from packaging.version import Version

    from winnow.models.supported_versions import NEWEST, OLDEST, RANGE

    ends = [Version(pins(f"constraints{end}.txt")["transformers"]) for end in ("", "-newest")]
    assert [(end.major, end.minor) for end in ends] == [OLDEST, NEWEST]
    found = {r.name: r.specifier for r in map(Requirement, project()["dependencies"])}["transformers"]
    below = (NEWEST[0], NEWEST[1] + 1)
    assert found.contains(f"{OLDEST[0]}.{OLDEST[1]}.0")
    assert not found.contains(f"{OLDEST[0]}.{OLDEST[1] - 1}.99")
    assert found.contains(f"{NEWEST[0]}.{NEWEST[1]}.99")
    assert not found.contains(f"{below[0]}.{below[1]}.0")
    assert all(f"{end[0]}.{end[1]}" in RANGE for end in (OLDEST, below))
    assert "make test-newest" in (ROOT / ".ci" / "run").read_text()


def test_the_makefile_has_the_promised_targets_and_its_files_exist():
    text = (ROOT / "Makefile").read_text()
    for target in ("venv", "demo", "test", "test-newest", "test-all", "lint", "bench", "systems", "help"):
        assert re.search(rf"^{target}:.*## ", text, re.MULTILINE), f"make {target}"
    for script in re.findall(r"\$\(BIN\)/python (\w+/\w+\.py)", text):
        assert (ROOT / script).is_file(), script
    assert os.access(ROOT / ".ci" / "run", os.X_OK)


def test_links_between_documents_lead_somewhere():
    broken = []
    for name, text in texts().items():
        if name.endswith(".md"):
            for target in re.findall(r"\]\((?!https?:|#)([^)#]+)", text):
                if not ((ROOT / name).parent / target).exists():
                    broken.append(f"{name}: {target}")
    assert not broken


BLOCK = re.compile(r"```python\n(.*?)```", re.DOTALL)
DOCUMENTS = ["README.md", *sorted(f"docs/{path.name}" for path in (ROOT / "docs").glob("*.md"))]
BLOCKS = [
    pytest.param(block, id=f"{name}-{number}")
    for name in DOCUMENTS
    for number, block in enumerate(BLOCK.findall((ROOT / name).read_text()), 1)
]


@pytest.mark.parametrize("block", BLOCKS)
def test_the_code_of_the_documentation_runs(block, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    exec(compile(block, "a block of the documentation", "exec", dont_inherit=True), {"__name__": "documentation"})  # noqa: S102


def test_the_readme_has_code_and_the_two_commands():
    text = (ROOT / "README.md").read_text()
    assert BLOCK.search(text)
    assert "make demo" in text
    assert "make test" in text


def test_the_example_of_contributing_passes_every_generic_check(tmp_path, monkeypatch):
    (example,) = BLOCK.findall((ROOT / "CONTRIBUTING.md").read_text())
    assert example.count("\n") <= 40
    (tmp_path / "longest.py").write_text(example)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setattr(registry, "_extra", {})
    monkeypatch.setattr(registry, "_classes", dict(registry._classes))
    check_method(importlib.import_module("longest").Longest)
    assert str(winnow.plan("longest:keep=64")) == "longest:keep=64"
    assert [entry.slug for entry in winnow.list_methods() if entry.family == "user"] == ["longest"]
