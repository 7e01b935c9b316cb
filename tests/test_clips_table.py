"""The tables of methods on clips: what is measured, how methods are told apart, and what the page says."""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from winnow.core.layout import Layout
from winnow.core.plan import Plan
from winnow.core.step import State
from winnow.core.view import View

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture
def tool(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.setattr(sys, "path", [str(ROOT / "tools"), *sys.path])
    spec = importlib.util.spec_from_file_location("tool_clips", ROOT / "tools" / "clips.py")  # tests have a `clips` too
    assert spec is not None
    assert spec.loader is not None
    made = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, spec.name, made)
    spec.loader.exec_module(made)
    return made


def test_all_methods_that_look_across_frames_are_asked(tool: Any) -> None:
    assert {"evs", "vidcom2", "fastvid", "dycoke", "prunevid", "holitom", "stc", "centerclip"} <= set(
        tool.across_frames()
    )
    plans = tool.asked_for()
    assert all(any(plan.startswith(slug) for plan in plans) for slug in tool.across_frames())
    assert all(Plan.of(plan).methods for plan in plans)


def test_the_committed_page_is_what_the_figures_say(tool: Any) -> None:
    figures = json.loads(tool.FIGURES.read_text(encoding="utf-8"))
    page = tool.PAGE.read_text(encoding="utf-8")
    shown = page.partition(tool.BEGIN)[2].partition(tool.END)[0].strip()
    assert shown == tool.tables(figures)
    names = {row["name"] for row in figures["rows"]}
    assert {"full", "blind", "shuffled", "single-frame", tool.SAMPLED, *tool.across_frames()} <= names
    assert set(figures["types"]) == {"presence", "needle", "motion", "when", "color", "order", "cause"}
    assert not [row["name"] for row in figures["rows"] if row["status"] != "ok"]
    budgets = {row["budget"] for row in figures["rows"] if row["name"] == tool.SAMPLED}
    assert budgets == set(tool.BUDGETS)


def test_methods_are_told_apart_by_what_they_read(tool: Any) -> None:
    found = tool.kinds(["evs:keep=25%", "stc:keep=25%", "prunevid", "fastv:keep=25%"])
    assert found == {
        "evs:keep=25%": {"reads_text": False, "causal": False},
        "stc:keep=25%": {"reads_text": False, "causal": True},
        "prunevid": {"reads_text": True, "causal": False},
        "fastv:keep=25%": {"reads_text": True, "causal": False},
    }


def kept(plan: str, tokens: torch.Tensor, layout: Layout) -> torch.Tensor:
    """Which tokens of the first half of a clip stay."""
    (method,) = Plan.of(plan).methods
    view = View.of(tokens, layout=layout)
    found = method.prune(view, State())[0].reduction if method.streaming else method.reduce(view)
    return found.kept[0][: tokens.shape[1] // 2]


def test_what_declares_itself_causal_does_not_see_later_frames() -> None:
    layout, generator = Layout.grid(3, 3, 8), torch.Generator().manual_seed(0)
    first = torch.randn(1, 72, 32, generator=generator)
    for seed in range(3):
        other = first.clone()
        other[:, 36:] = torch.randn(1, 36, 32, generator=torch.Generator().manual_seed(seed + 1))
        assert torch.equal(kept("stc:keep=24", first, layout), kept("stc:keep=24", other, layout))
        assert not torch.equal(kept("vidcom2:keep=24", first, layout), kept("vidcom2:keep=24", other, layout))


def test_a_difference_is_bold_where_its_interval_leaves_out_zero(tool: Any) -> None:
    assert tool._gap([-0.2, -0.3, -0.1]) == "**-20 [-30, -10]**"
    assert tool._gap([-0.02, -0.1, 0.06]) == "-2 [-10, +6]"
    assert tool._gap(None) == ""
