"""The registry of methods. Listing it reads source files, not modules: `winnow methods` imports no torch.

What is known of a published system stands once: its family, stages and kind in `data/systems.json`, its source in the
first lines of the method's file, its summary in the docstring of the class.
"""

import ast
import difflib
import functools
import importlib
import importlib.metadata
import json
import re
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from importlib.resources import files
from pathlib import Path
from typing import Any, TypeVar, dataclass_transform

from winnow.core.errors import WinnowError
from winnow.core.listing import class_attribute, described_class, read_class
from winnow.core.point import AHEAD

M = TypeVar("M", bound=type)
METHODS_DIR = Path(__file__).resolve().parent.parent / "methods"
STAGES = ("input", "encoder", "connector", "decoder", "cache", "decoding")
KINDS = ("training-free", "learned")
_CACHE = "CacheMethod"  # what methods of the cache derive
_ARXIV = re.compile(r"arXiv[: ](\d{4}\.\d{4,5})")


@dataclass(frozen=True)
class Entry:
    """What is known of a method without importing it.

    Attributes:
        slug: its name in plans.
        module: where its class is defined.
        family: letter of the system table (A … I), or "user".
        stages: input, encoder, connector, decoder, cache, decoding.
        kind: training-free or learned.
        arxiv: identifier of the source.
        summary: first line of the class docstring.
        name: of the class.
        settings: name of each setting → its `type`, as written, and its `default` as plan strings write it.
        released: the settings and the `positions` of the authors' released code, or None.
        of_cache: whether it acts on the KV cache, and not on the tokens of pictures.
        of_sounds: whether it is meant for sounds, or for what is heard beside a video, and not for pictures.
        of_input: whether it acts ahead of the processor alone (`at` is prompt, frames or pixels), and not on tokens.
    """

    slug: str
    module: str
    family: str = "user"
    stages: tuple[str, ...] = ("connector",)
    kind: str = "training-free"
    arxiv: str = ""
    summary: str = ""
    name: str = ""
    settings: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    released: Mapping[str, Any] | None = None
    of_cache: bool = False
    of_sounds: bool = False
    of_input: bool = False


_extra: dict[str, Entry] = {}
_classes: dict[str, Any] = {}


@dataclass_transform(frozen_default=True)
def register(
    slug: str, *, stages: tuple[str, ...] = ("connector",), kind: str = "training-free", arxiv: str = ""
) -> Callable[[M], M]:
    """Register a Method class under a slug, and make it a frozen dataclass if it is none yet.

    Args:
        stages, kind, arxiv: of a method that is not in winnow's table of systems.
    """
    if kind not in KINDS or not set(stages) <= set(STAGES) or not stages:
        raise WinnowError(
            f"register({slug!r}): kind is one of {KINDS} and stages are from {STAGES}; got {kind!r}, {stages!r}."
        )

    def add(cls: M) -> M:
        known, listed = _classes.get(slug), built_in().get(slug)
        if known is not None and (known.__module__, known.__qualname__) != (cls.__module__, cls.__qualname__):
            raise WinnowError(f"The slug {slug!r} is taken by {known.__module__}.{known.__qualname__}; choose another.")
        if listed is not None and listed.module != cls.__module__:  # also while nobody has imported it yet
            raise WinnowError(f"The slug {slug!r} is taken by {listed.module}; choose another.")
        if "__dataclass_fields__" not in cls.__dict__:
            cls = dataclass(frozen=True)(cls)  # type: ignore[assignment]
        cls.slug = slug  # type: ignore[attr-defined]
        _classes[slug] = cls
        if listed is None:
            summary = (cls.__doc__ or "").strip().split("\n")[0]
            source = arxiv or _source(getattr(sys.modules.get(cls.__module__), "__doc__", None))
            facts = ("user", tuple(stages), kind, source, summary, cls.__name__)
            of_cache = any(base.__name__ == _CACHE for base in cls.__mro__)
            of_sounds = _without_pictures(getattr(cls, "modalities", None))
            of_input = getattr(cls, "at", None) in AHEAD
            _extra[slug] = Entry(slug, cls.__module__, *facts, *described_class(cls), of_cache, of_sounds, of_input)
        return cls

    return add


def _without_pictures(modalities: tuple[str, ...] | None) -> bool:
    """Whether a method's class says that it does not act on pictures; None: it says nothing."""
    return modalities is not None and "image" not in modalities


def _source(docstring: str | None) -> str:
    found = _ARXIV.search(docstring or "")
    return found[1] if found else ""


@functools.cache
def _systems() -> dict[str, dict[str, Any]]:
    rows = json.loads((files("winnow") / "data" / "systems.json").read_text(encoding="utf-8"))["systems"]
    return {row["slug"]: row for row in rows}


def _read(path: Path) -> list[Entry]:
    entries = []
    tree = ast.parse(path.read_text(encoding="utf-8"))
    for node in tree.body:
        if not isinstance(node, ast.ClassDef):
            continue
        for call in node.decorator_list:
            if isinstance(call, ast.Call) and ast.unparse(call.func).rpartition(".")[2] == "register":
                slug = ast.literal_eval(call.args[0])
                facts = {k.arg: ast.literal_eval(k.value) for k in call.keywords if k.arg}
                row = _systems().get(slug, {})
                facts |= {name: row[name] for name in ("family", "kind") if name in row}
                facts |= {"stages": tuple(row["stages"])} if "stages" in row else {}
                facts["arxiv"] = _source(ast.get_docstring(tree)) or facts.get("arxiv", "")
                summary = (ast.get_docstring(node) or "").split("\n")[0]
                facts["settings"], facts["released"] = read_class(node)
                facts["of_sounds"] = _without_pictures(class_attribute(node, "modalities"))
                facts["of_input"] = class_attribute(node, "at") in AHEAD
                facts["of_cache"] = any(ast.unparse(base).rpartition(".")[2] == _CACHE for base in node.bases)
                entries.append(Entry(slug, f"winnow.methods.{path.stem}", summary=summary, name=node.name, **facts))
    return entries


@functools.cache
def built_in() -> dict[str, Entry]:
    """The methods of this package, by slug."""
    entries = [entry for path in sorted(METHODS_DIR.glob("*.py")) for entry in _read(path)]
    return {entry.slug: entry for entry in entries}


def _from_entry_points() -> None:
    """Load methods that other distributions offer under the entry point group `winnow.methods`."""
    for point in importlib.metadata.entry_points(group="winnow.methods"):
        if point.name not in _classes:
            point.load()


def entries() -> tuple[Entry, ...]:
    """All methods, sorted by slug: the built-in ones, installed plug-ins, and those registered by the user."""
    _from_entry_points()
    return tuple(sorted((built_in() | _extra).values(), key=lambda e: e.slug))


def picture_methods() -> tuple[Entry, ...]:
    """The methods that act on the tokens of pictures, where those of the cache and of what is heard have no part."""
    return tuple(entry for entry in token_methods() if not entry.of_sounds)


def token_methods() -> tuple[Entry, ...]:
    """The methods that act on the tokens of items, be they pictures or sounds, not on the cache or ahead of them."""
    return tuple(entry for entry in entries() if not entry.of_cache and not entry.of_input)


def method_class(slug: str) -> Any:
    """The class of a slug; unknown slugs raise with the nearest names."""
    if slug in built_in():
        importlib.import_module(built_in()[slug].module)
    elif slug not in _classes:
        _from_entry_points()
    if slug not in _classes:
        known = [e.slug for e in entries()]
        near = difflib.get_close_matches(slug, known, 3)
        hint = f" Did you mean {' or '.join(near)}?" if near else ""
        raise WinnowError(f"Unknown method {slug!r}; known: {', '.join(known)}.{hint}")
    return _classes[slug]
