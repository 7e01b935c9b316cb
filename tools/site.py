"""Hooks of mkdocs: the pages of the repository's root are pages of the site too, and links lead to them."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File

ROOT = Path(__file__).resolve().parent.parent
PAGES = ("CONTRIBUTING.md", "CHANGELOG.md", "SECURITY.md")
DOWN = re.compile(r"(?<=\]\()\.\./(?=(?:\.\./)*(" + "|".join(map(re.escape, PAGES)) + r")\b)")
TITLE = re.compile(r"^# (.*)$", re.MULTILINE)
UP = re.compile(r"(?<=\]\()docs/")


def on_config(config: Any) -> Any:
    """Name the pages of the methods below their index; they are written by tools/docs.py."""
    pages = sorted((ROOT / "docs" / "methods").glob("*.md"), key=lambda path: (path.stem != "index", path.stem))
    for entry in config.nav:
        if "Methods" in entry:
            index, *others = (f"methods/{path.name}" for path in pages)
            titles = (TITLE.search(path.read_text(encoding="utf-8"))[1] for path in pages[1:])
            entry["Methods"] = [index, *({title: name} for title, name in zip(titles, others, strict=True))]
    return config


def on_files(files: Any, config: Any) -> Any:
    """Add the root's pages."""
    for name in PAGES:
        files.append(File.generated(config, name, content=(ROOT / name).read_text(encoding="utf-8")))
    return files


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """From docs/, `../CONTRIBUTING.md`; from the root, `docs/systems.md`: both are side by side on the site."""
    return UP.sub("", markdown) if page.file.src_uri in PAGES else DOWN.sub("", markdown)
