"""The streams of the command line: any encoding, readers that go away, and errors that are told in one line."""

from __future__ import annotations

import contextlib
import json
import os
import sqlite3
import sys
from typing import Any

import typer

from winnow.core.errors import WinnowError


def forgiving(stream: Any) -> None:
    """Let a text stream replace what its encoding cannot show, where it would raise."""
    if getattr(stream, "errors", None) == "strict" and hasattr(stream, "reconfigure"):
        stream.reconfigure(errors="replace")


def say(text: object) -> None:
    """Print a line on stdout. `typer.echo` alone would write UTF-8 where the stream is ASCII."""
    typer.echo(text, file=sys.stdout)


def warn(text: str) -> None:
    """Print a line on stderr, with the name of the program before it."""
    typer.echo(f"winnow: {text}", file=sys.stderr)


def print_json(value: Any) -> None:
    """Print JSON on stdout; what stdout's encoding cannot show is escaped, so that nothing of it is lost."""
    text = json.dumps(value, ensure_ascii=False, indent=1)
    try:
        text.encode(getattr(sys.stdout, "encoding", None) or "utf-8")
    except UnicodeError:
        text = json.dumps(value, indent=1)
    say(text)


def mistake(error: Exception) -> str | None:
    """What to say of an error that a user or the machine has caused; None for a fault of ours."""
    if isinstance(error, WinnowError):
        return str(error)
    if isinstance(error, OSError):
        named = f": {error.filename}" if error.filename else ""
        return f"{error.strerror or type(error).__name__}{named}"
    if isinstance(error, sqlite3.Error):
        return (
            "The store cannot be opened, read or written: it is not one, it is read-only, or another process holds it."
        )
    if isinstance(error, MemoryError) or ("torch" in sys.modules and _of_torch(error)):
        return "Memory ran out; use a smaller picture, batch or model, or --dtype bfloat16."
    return None


def _of_torch(error: Exception) -> bool:
    from winnow.core.memory import out_of_memory

    return out_of_memory(error)


def flush() -> None:
    """Write what stdout still holds. A reader that went away (`winnow systems | head`) causes no traceback."""
    if sys.stdout is None:  # started without one
        return
    with contextlib.suppress(ValueError):  # closed already
        try:
            sys.stdout.flush()
        except OSError as error:
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # Python flushes again at exit
            if not isinstance(error, BrokenPipeError):
                sys.stderr.write(f"winnow: {error.strerror}: the output is not complete\n")
                raise SystemExit(2) from None
