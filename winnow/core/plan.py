"""Plan: methods with their settings, in order, and the position policy. Its string is the key of every result."""

import ast
import dataclasses
import functools
import os
import re
from dataclasses import dataclass
from typing import Any

from winnow.core.budget import Budget
from winnow.core.errors import WinnowError
from winnow.core.info import ModelInfo
from winnow.core.kv_budget import KVBudget
from winnow.core.method import Method
from winnow.core.plan_file import names_file, read_plan_file
from winnow.core.registry import method_class
from winnow.core.signal import Signal
from winnow.core.step import Step

SCHEMA = 2
FULL = "full"
RELEASED = "released"
POSITIONS = ("keep", "compact")
_GRAMMAR = (
    'write "slug:key=value,… + slug:… | positions=keep", for example "divprune:keep=64 + fastv:layer=2,keep=50%"; '
    'the word released stands for the settings of the authors\' code, as in "hiprune:released,keep=64"'
)


@dataclass(frozen=True)
class Plan:
    """What to do to a model.

    Args:
        methods: applied along the data; at one point, in this order. None of them: the model in full ("full").
        positions: `keep` (each survivor keeps its true position, a merged token its representative's) or `compact`
            (survivors and what follows them are renumbered, as several papers' code does; 1-D positions only).
        seed: of the methods' own random numbers.
    """

    methods: tuple[Method, ...]
    positions: str = "keep"
    seed: int = 0

    def __post_init__(self) -> None:
        for method in self.methods:
            if not isinstance(method, Method):
                raise WinnowError(f"A plan is made of Methods, got {type(method).__name__} {method!r}.")
        if self.positions not in POSITIONS:
            raise WinnowError(f"positions={self.positions!r}; allowed: {', '.join(POSITIONS)}.")
        if isinstance(self.seed, bool) or not isinstance(self.seed, int) or self.seed < 0:
            raise WinnowError(f"seed={self.seed!r}; allowed: an int ≥ 0.")

    @staticmethod
    def of(spec: "str | os.PathLike[str] | Plan | Method", *, positions: str | None = None) -> "Plan":
        """A plan from a string, a plan file, a Method or a Plan; `positions` overrides what it says."""
        if isinstance(spec, os.PathLike) or (isinstance(spec, str) and names_file(spec)):
            plan = Plan.parse(read_plan_file(spec)["plan"])
        elif isinstance(spec, str):
            plan = Plan.parse(spec)
        elif isinstance(spec, Method):
            plan = Plan((spec,))
        elif isinstance(spec, Plan):
            plan = spec
        else:
            raise WinnowError(
                f"A plan is a string, a plan file, a Method or a Plan, got {type(spec).__name__}; {_GRAMMAR}."
            )
        return plan if positions is None else dataclasses.replace(plan, positions=positions)

    @staticmethod
    def parse(text: str) -> "Plan":
        """Read a plan string. A leading `v1|` names the schema version and is checked."""
        body = text.strip()
        if version := re.match(r"v(\d+)\|", body):
            if int(version[1]) != SCHEMA:
                raise WinnowError(f"The plan {text!r} has schema {version[1]}; this winnow reads schema {SCHEMA}.")
            body = body[version.end() :]
        chain, *options = _split(body, "|")
        if len(options) > 1:
            raise WinnowError(f"The plan {text!r} has more than one '|'; {_GRAMMAR}.")
        settings = _settings(options[0], text) if options else {}
        unknown = set(settings) - {"positions", "seed"}
        if unknown:
            raise WinnowError(
                f"Unknown plan option {', '.join(sorted(unknown))} in {text!r}; options: positions, seed."
            )
        methods, policies = [], []
        for part in [] if chain.strip() == FULL else _split(chain, "+"):
            method, released = _method(part, text)
            methods.append(method)
            if released:
                policies.append((method.released or {}).get("positions", "keep"))
        if "positions" not in settings and policies:
            if len(set(policies)) > 1 or len(policies) < len(methods):
                raise WinnowError(
                    f"The methods of {text!r} as released do not share a position policy; write | positions=keep or "
                    "| positions=compact."
                )
            settings["positions"] = policies[0]
        return Plan(tuple(methods), **settings)

    def bind(self, info: ModelInfo) -> tuple["Plan", tuple[tuple[int, Step], ...]]:
        """The plan with resolved methods, and (number of the method, step) along the data, checked for the model."""
        bound = [method.bind(info) for method in self.methods]
        steps = [(i, step) for i, (_, own) in enumerate(bound) for step in own]
        resolved = dataclasses.replace(self, methods=tuple(method for method, _ in bound))
        return resolved, tuple(sorted(steps, key=lambda pair: pair[1].at.rank))

    def steps(self, info: ModelInfo) -> tuple[tuple[int, Step], ...]:
        """The steps of `bind`."""
        return self.bind(info)[1]

    def __str__(self) -> str:
        """The shortest string that reads back as this plan: settings at their defaults are left out."""
        return self._text(all_settings=False)

    @functools.cached_property
    def key(self) -> str:
        """The string with its schema version and every setting: equal keys are equal plans in any later version."""
        return f"v{SCHEMA}|{self._text(all_settings=True)}"

    def _text(self, all_settings: bool) -> str:
        parts = []
        for method in self.methods:
            shown, defaults = [], method.defaults()
            for name in method.settings():
                value = getattr(method, name)
                if all_settings or name not in defaults or value != defaults[name]:
                    shown.append(f"{name}={_show(value)}")
            parts.append(method.slug + (":" + ",".join(shown) if shown else ""))
        text = " + ".join(parts) or FULL
        options = []
        if all_settings or self.positions != "keep":
            options.append(f"positions={self.positions}")
        if all_settings or self.seed:
            options.append(f"seed={self.seed}")
        return text + (" | " + ",".join(options) if options else "")


def slugs_of(text: str) -> tuple[str, ...]:
    """The methods that a plan string names, read from the text alone: nothing is imported, made or checked."""
    body = re.sub(r"^v\d+\|", "", text.strip())
    chain = _split(body, "|")[0]
    return () if chain.strip() == FULL else tuple(part.partition(":")[0].strip() for part in _split(chain, "+"))


def method_of(text: str) -> Method:
    """One method, from "slug:key=value,…"."""
    return _method(text, text)[0]


def _method(part: str, whole: str) -> tuple[Method, bool]:
    """A method as a plan names it, and whether with the settings of its released code."""
    slug, _, args = part.strip().partition(":")
    if not re.fullmatch(r"[\w-]+", slug.strip()):
        raise WinnowError(f"Cannot read {part.strip()!r} in the plan {whole!r}; {_GRAMMAR}.")
    cls = method_class(slug.strip())
    values = _settings(args, whole, words=(RELEASED,))
    released = values.pop(RELEASED, False)
    return (cls.as_released(**values) if released else cls.configured(**values)), released


def _show(value: Any) -> str:
    if isinstance(value, Budget | KVBudget):
        return str(value)
    if isinstance(value, Signal):
        shown = ",".join(f"{f.name}={_show(getattr(value, f.name))}" for f in dataclasses.fields(value))
        return f"{type(value).__name__}({shown})"
    if isinstance(value, tuple):
        return "[" + ",".join(_show(v) for v in value) + "]"
    if isinstance(value, bool) or value is None:
        return str(value).lower()
    return str(value)


def _split(text: str, mark: str) -> list[str]:
    """Split at a mark outside brackets."""
    parts, depth, start = [], 0, 0
    for i, char in enumerate(text):
        depth += (char in "[(") - (char in "])")
        if char == mark and depth == 0:
            parts.append(text[start:i])
            start = i + 1
    parts.append(text[start:])
    return parts


def _settings(text: str, whole: str, words: tuple[str, ...] = ()) -> dict[str, Any]:
    """`key=value` pairs, and words that stand alone, which are True."""
    values: dict[str, Any] = {}
    for pair in _split(text, ","):
        if not pair.strip():
            continue
        name, eq, value = (pair, "=", "true") if pair.strip() in words else pair.partition("=")
        if not eq or not name.strip().isidentifier() or not value.strip():
            raise WinnowError(f"Cannot read {pair.strip()!r} in the plan {whole!r}; {_GRAMMAR}.")
        if name.strip() in values:
            raise WinnowError(f"{name.strip()!r} is given twice in the plan {whole!r}.")
        values[name.strip()] = _value(value.strip(), whole)
    return values


def _value(text: str, whole: str) -> Any:
    if text.lower() in ("true", "false"):
        return text.lower() == "true"
    if text.lower() == "none":
        return None
    if text.startswith("["):
        if not text.endswith("]"):
            raise WinnowError(f"Unclosed bracket in {text!r} in the plan {whole!r}.")
        return tuple(_value(v.strip(), whole) for v in _split(text[1:-1], ",") if v.strip())
    if re.match(r"[A-Za-z_]\w*\(", text) and not text.endswith(")"):
        raise WinnowError(f"Unclosed bracket in {text!r} in the plan {whole!r}.")
    if call := re.fullmatch(r"([A-Za-z_]\w*)\((.*)\)", text):
        return _signal(call[1], _settings(call[2], whole), whole)
    try:
        number = ast.literal_eval(text)
    except (ValueError, SyntaxError):
        return text
    return number if isinstance(number, int | float) else text


def _signal(name: str, values: dict[str, Any], whole: str) -> Signal:
    known = _below(Signal)
    kinds = {(kind.__module__, kind.__qualname__): kind for kind in known if kind.__name__ == name}  # a cell run twice
    if len(kinds) != 1:
        names = ", ".join(sorted({kind.__name__ for kind in known}))
        raise WinnowError(f"The plan {whole!r} names the signal {name}; known, and known once, are: {names}.")
    (kind,) = kinds.values()
    fields = {f.name for f in dataclasses.fields(kind)}
    if unknown := sorted(set(values) - fields):
        raise WinnowError(f"{name} has no setting {unknown[0]!r}; it has {', '.join(sorted(fields)) or 'none'}.")
    return kind(**values)


def _below(kind: type) -> list[type]:
    """All subclasses, at any depth, in the order in which they were defined."""
    below: list[type] = kind.__subclasses__()
    return [found for sub in below for found in (sub, *_below(sub))]
