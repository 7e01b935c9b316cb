"""What the registry lists of a class: its settings and those of the authors' code, read from source or from the class.

Values are those of JSON. A budget is its value, a signal the text by which a plan string writes it.
"""

import ast
import dataclasses
import re
from typing import Any

Settings = dict[str, dict[str, Any]]


def read_class(node: ast.ClassDef) -> tuple[Settings, dict[str, Any] | None]:
    """Settings and `released` of a method's class, from its source alone."""
    settings: Settings = {}
    released = None
    for item in node.body:
        if isinstance(item, ast.AnnAssign) and isinstance(item.target, ast.Name) and not _hidden(item):
            settings[item.target.id] = _setting(ast.unparse(item.annotation), item.value and _read(item.value))
        elif isinstance(item, ast.Assign) and ast.unparse(item.targets[0]) == "released":
            released = _read(item.value)
    return settings, released


def class_attribute(node: ast.ClassDef, name: str) -> Any:
    """The value that the body of a class gives a name, read from source; None where it does not."""
    for item in node.body:
        if isinstance(item, ast.Assign) and ast.unparse(item.targets[0]) == name:
            return ast.literal_eval(item.value)
    return None


def described_class(cls: Any) -> tuple[Settings, dict[str, Any] | None]:
    """The same of a class that has been imported."""
    settings = {}
    for name, field in cls.settings().items():
        kind = field.type.__name__ if isinstance(field.type, type) else str(field.type)
        default = None if field.default is dataclasses.MISSING else plain(field.default)
        settings[name] = _setting(kind, default)
    return settings, plain(cls.released)


def plain(value: Any) -> Any:
    """A value of a setting as JSON has it."""
    if isinstance(value, dict):
        return {name: plain(v) for name, v in value.items()}
    if isinstance(value, list | tuple):
        return [plain(v) for v in value]
    if value is None or isinstance(value, bool | int | float | str):
        return value
    if type(value).__name__ == "Budget":
        return str(value) if value.allow_empty else value.value
    if type(value).__name__ == "KVBudget":
        return plain(value.value)
    if dataclasses.is_dataclass(value):
        given = {f.name: getattr(value, f.name) for f in dataclasses.fields(value)}
        changed = {f.name: given[f.name] for f in dataclasses.fields(value) if given[f.name] != f.default}
        return _call(type(value).__name__, {name: plain(v) for name, v in changed.items()})
    return str(value)


def _setting(kind: str, default: Any) -> dict[str, Any]:
    return {"type": re.sub(r"\b[A-Za-z_]\w*\.(?=[A-Za-z_])", "", kind), "default": default}


def _call(name: str, given: dict[str, Any]) -> str:
    shown = {k: str(v).lower() if v is None or isinstance(v, bool) else v for k, v in given.items()}
    return f"{name}({','.join(f'{k}={v}' for k, v in shown.items())})"


def _hidden(item: ast.AnnAssign) -> bool:
    """Whether an annotated name is a class attribute, or a field that is not a setting."""
    text = "" if item.value is None else ast.unparse(item.value)
    return "ClassVar" in ast.unparse(item.annotation) or re.search(r"'setting': False", text) is not None


def _read(node: ast.expr) -> Any:
    if isinstance(node, ast.Tuple | ast.List):
        return [_read(item) for item in node.elts]
    if isinstance(node, ast.Dict):
        return {ast.literal_eval(k): _read(v) for k, v in zip(node.keys, node.values, strict=True) if k is not None}
    if isinstance(node, ast.Call):
        name = ast.unparse(node.func).rpartition(".")[2]
        given = {k.arg: _read(k.value) for k in node.keywords if k.arg}
        if name == "Budget" and node.args:
            value = _read(node.args[0])
            return f"{value}?" if given.get("allow_empty") else value
        if name == "KVBudget" and node.args:
            return _read(node.args[0])
        return _call(name, given)
    return ast.literal_eval(node)
