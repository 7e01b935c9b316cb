"""Plan files: a plan with what was measured of it, as `winnow tune` writes them. Read wherever a plan is accepted."""

import json
import os
from pathlib import Path
from typing import Any

from winnow.core.errors import WinnowError

VERSION = 1
MARK = "winnow_plan"  # the entry that holds the version
LARGEST = 2**20  # bytes


def names_file(text: str) -> bool:
    """Whether a string names a plan file: it ends in .json, and is not a plan whose last setting does."""
    name = text.strip()
    return name.endswith(".json") and ("=" not in name or os.path.isfile(name))


def read_plan_file(path: str | os.PathLike[str]) -> dict[str, Any]:
    """What a plan file says; its `plan` is a plan string.

    Raises:
        WinnowError: the file cannot be read, or is no plan file of this version.
    """
    name = str(path).strip()
    try:
        with open(name, "rb") as file:
            raw = file.read(LARGEST + 1)
    except (OSError, ValueError) as error:
        said = getattr(error, "strerror", None) or "no file can have this name"
        raise WinnowError(f"The plan file {name} cannot be read: {said}. `winnow tune` writes one.") from None
    try:
        content = json.loads(raw) if len(raw) <= LARGEST else None
    except (ValueError, RecursionError):
        content = None
    if not isinstance(content, dict) or MARK not in content:
        raise WinnowError(
            f'{name} is no plan file: JSON with "{MARK}": {VERSION} and "plan". `winnow tune` writes one.'
        )
    if content[MARK] != VERSION:
        raise WinnowError(f"The plan file {name} has version {content[MARK]!r}; this winnow reads version {VERSION}.")
    plan = content.get("plan")
    if not isinstance(plan, str) or not plan.strip() or names_file(plan):
        raise WinnowError(f"The plan file {name} holds no plan: its plan is {plan!r}; it must be a plan string.")
    return content


def checked_name(path: str | os.PathLike[str]) -> Path:
    """A path under which a plan file can be written and found again.

    Raises:
        WinnowError: its name does not end in .json, or it is a folder.
    """
    target = Path(path)
    if target.suffix != ".json" or target.is_dir():
        raise WinnowError(f"{target} is not the name of a plan file; end it in .plan.json.")
    return target


def write_plan_file(path: str | os.PathLike[str], plan: str, about: dict[str, Any]) -> Path:
    """Write a plan and what is known of it, completely or not at all."""
    target = checked_name(path)
    target.parent.mkdir(parents=True, exist_ok=True)
    part = target.with_name(f".{target.name}.part")
    text = json.dumps({MARK: VERSION, "plan": plan, **about}, indent=1, ensure_ascii=False, allow_nan=False)
    part.write_text(text + "\n", encoding="utf-8")
    os.replace(part, target)
    return target
