"""The page of the methods of the cache: what is compared, what is left out, and what is measured once."""

from __future__ import annotations

import importlib
import json
import sys
from pathlib import Path
from typing import Any

import pytest

TOOLS = Path(__file__).resolve().parent.parent / "tools"
GOOD, BAD = [True] * 30 + [False] * 2, [False] * 31 + [True]


@pytest.fixture
def tools(monkeypatch: pytest.MonkeyPatch) -> tuple[Any, Any]:
    monkeypatch.setattr(sys, "path", [str(TOOLS), *sys.path])
    return importlib.import_module("cache"), importlib.import_module("cache_page")


def full_row(words: Any, able: dict[str, int]) -> Any:
    """The full cache, which answers for so many pictures of each task."""
    found = {}
    for cell in words.abilities():
        right = not cell.blind and cell.pictures <= able[cell.task]
        found[cell] = {"right": GOOD if right else BAD}
    return words.Row("full", "", found)


def test_methods_are_compared_where_the_full_cache_can_answer(tools: tuple[Any, Any]) -> None:
    _, words = tools
    full = full_row(words, {"turns": 3, "frames": 1})
    compared = words.able(full)
    assert [(cell.task, cell.aware, cell.pictures) for cell in compared] == [("turns", True, 3), ("turns", False, 3)]
    texts = [words.Row("full", "", {key: {"right": GOOD, "bytes": 1.0} for key in (*words.TEXTS, words.BYTES)})]
    rows = [
        words.Row("full", "", {cell: {"right": GOOD} for cell in compared}),
        words.Row("lost", "5%", {cell: {"right": BAD} for cell in compared}),
        words.Row("none", "5%", {cell: {"refused": "it cannot"} for cell in compared}),
    ]
    page = words.page(texts, rows, full, 32, 20)
    assert "for *frames*: the" in page
    assert "| turns | 3 | 0.94 | 0.94 | 0.03 |" in page
    assert "| `lost` | 5% | 0.03 | 0.03 |" in page
    assert "| `none` | 5% | – | – |" in page
    assert "- `none`: it cannot" in page


def test_nothing_is_compared_where_it_cannot(tools: tuple[Any, Any]) -> None:
    _, words = tools
    full = full_row(words, {"turns": 1, "frames": 0})
    assert words.able(full) == ()
    texts = [words.Row("full", "", {key: {"right": GOOD, "bytes": 1.0} for key in (*words.TEXTS, words.BYTES)})]
    page = words.page(texts, [], full, 32, 20)
    assert "for *turns* and *frames*: the" in page
    assert "Methods on what" not in page


def test_what_the_store_has_is_not_measured_again(
    tools: tuple[Any, Any], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    tool, words = tools
    store = tmp_path / "table.jsonl"
    monkeypatch.setattr(tool, "STORE", store)
    cell = words.TEXTS[0]
    job = ("nothing-of-this-name", "5%", "nothing-of-this-name", cell, 2)
    store.write_text(json.dumps({"key": "a", "right": [True], "seconds": 1.0}) + "\n")
    assert tool.measured(1, {"a": job})["a"]["right"] == [True]
    found = tool.measured(1, {"a": job, "b": job})  # which a process measures, or says why not
    assert "nothing-of-this-name" in found["b"]["refused"]
    assert [json.loads(line)["key"] for line in store.read_text().splitlines()] == ["a", "b"]
    assert tool.known(store)["b"] == found["b"]


def test_every_method_of_the_cache_has_rows_and_codecs_one(tools: tuple[Any, Any]) -> None:
    rows = tools[0].plans()
    assert rows[0] == ("full", "", "full")
    assert [budget for slug, budget, _ in rows if slug == "snapkv"] == list(tools[0].BUDGETS)
    assert [budget for slug, budget, _ in rows if slug == "gear"] == [""]
    assert len({plan for *_, plan in rows}) == len(rows)
