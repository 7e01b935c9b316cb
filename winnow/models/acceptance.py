"""Which classes without an adapter of their own have passed the doctor's checks, and at which points.

Remembered for a class, a version of transformers and of winnow, an attention implementation and a configuration: in
this process, and in `accepted.json` under $WINNOW_CACHE or the user's cache folder, so that a server that starts again
does not check again.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
from pathlib import Path
from typing import Any
from weakref import WeakKeyDictionary

import transformers

from winnow._version import __version__

_known: dict[str, tuple[str, ...]] = {}
_hashes: WeakKeyDictionary[Any, str] = WeakKeyDictionary()


def accepted_points(model: Any) -> tuple[str, ...]:
    """The points at which a model may be compressed through the generic adapter; empty if it was not checked."""
    key = _key(model)
    if key not in _known:
        _known[key] = tuple(_read().get(key, ()))
    return _known[key]


def accept_points(model: Any, points: tuple[str, ...]) -> None:
    """Remember that the checks held at these points."""
    key = _key(model)
    _known[key] = points
    path = _file()
    # A folder that cannot be written costs a check in the next process, no more.
    with contextlib.suppress(OSError):
        path.parent.mkdir(parents=True, exist_ok=True)
        made = path.with_name(f"{path.name}.{os.getpid()}")
        made.write_text(json.dumps({**_read(), key: points}, indent=1), encoding="utf-8")
        made.replace(path)


def _key(model: Any) -> str:
    if model not in _hashes:
        _hashes[model] = _hash(model.config)
    attends = model.get_decoder().config._attn_implementation if model.get_decoder() is not None else None
    versions = f"transformers {transformers.__version__}, winnow {__version__}, {attends}"
    return f"{type(model).__name__}, {versions}, {_hashes[model]}"


def _hash(config: Any) -> str:
    settings = config.to_dict()
    settings.pop("_name_or_path", None)
    return hashlib.sha256(json.dumps(settings, sort_keys=True, default=str).encode()).hexdigest()[:16]


def _file() -> Path:
    cache = os.environ.get("WINNOW_CACHE")
    folder = Path(cache) if cache else Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "winnow"
    return folder / "accepted.json"


def _read() -> dict[str, Any]:
    try:
        found = json.loads(_file().read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}
