"""The table of cells: every method and baseline at every budget, and what each keeps there."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from winnow.bench.plans import jobs
from winnow.core.errors import WinnowError
from winnow.core.method import Method
from winnow.core.plan import Plan
from winnow.core.registry import picture_methods
from winnow.testing import WITH_CLS, Picture, Subject, run


def test_e10_the_table_of_cells_has_the_full_model_and_every_baseline_at_every_budget():
    found = jobs(("fastervlm",), ("64", "12.5%"), 256)
    assert found[0].key == "baseline:full"
    for label in ("random-M", "uniform-M", "downsample-M", "ceiling", "oracle", "fastervlm"):
        assert [(j.cell.budget, j.cell.keep) for j in found if j.cell.label == label] == [("64", 64), ("12.5%", 32)]
    assert len({j.key for j in found}) == len(found)


def test_budgets_become_plans():
    found = {
        (j.cell.label, j.cell.budget): str(j.plan) for j in jobs(("pyramiddrop", "fastv", "todre"), ("32", "64"), 256)
    }
    assert found["pyramiddrop", "32"] == "pyramiddrop:ratios=[128,64,32]"  # the published shares
    assert found["fastv", "64"] == "fastv:keep=64"
    assert found["todre", "32"] == "todre:keep=32"
    own = jobs(("fastv:layer=1,keep=10%",), ("32", "64"), 256)
    assert [j.cell.label for j in own if j.cell.kind == "method"] == ["fastv:keep=10%,layer=1"]


@pytest.mark.parametrize(
    ("methods", "budgets", "baselines", "told"),
    [
        ((), ("64",), (), "No method was named"),
        (("fastervlm", "fastervlm"), ("64",), (), "twice"),
        (("fastervlm",), ("64", "64"), ("best",), "Unknown baseline best"),
        (("fastervlm",), ("0",), (), "keeps nothing"),
        (("fasterVLM",), ("64",), (), "Did you mean fastervlm"),
        (("full",), ("64",), (), "always measured"),
    ],
)
def test_mistakes_in_the_table_of_cells_are_told(methods, budgets, baselines, told):
    with pytest.raises(WinnowError, match=told):
        jobs(methods, budgets, 256, baselines=baselines)


@pytest.mark.parametrize("slug", ["dyvte", "pixelprune", "vtw"])
def test_a_method_without_a_budget_is_measured_once_as_it_is(slug):
    measured = [job for job in jobs((slug,), ("64", "12.5%"), 256, baselines=()) if job.cell.kind == "method"]
    assert [(job.cell.label, job.cell.budget, job.cell.keep) for job in measured] == [(slug, "", None)]
    assert measured[0].plan == Plan.of(slug)


SHAPES = {256: (16, 16), 576: (24, 24), 2880: (48, 60), 25: (5, 5), 253: (11, 23), 100: (10, 10)}


def left_after(method: Method, content: int) -> int:
    """Content tokens that are left of an item when every step of a method has run, on random tokens and signals."""
    settings = {name: getattr(method, name) for name in method.settings()}
    subject = Subject(type(method), settings, (WITH_CLS,))
    left = entered = content
    for act in subject.acts():
        view = replace(subject.view(act, Picture.grid(*SHAPES[content]), b=1, left=left), n_lm=entered)
        if act.step.at.name == "blocks":  # [CLS], and what is left behind it
            some = {s: x[:, : left + 1] for s, x in view.signals.items()}
            view = replace(view, tokens=view.tokens[:, : left + 1], ids=view.ids[:, : left + 1], signals=some)
        # Text looks at the picture: no method drops all of it.
        looked = {s: torch.ones_like(x) if s.per == "item" else x for s, x in view.signals.items()}
        found = run(act.step, replace(view, signals=looked))
        left = left if found is None else found.m - (act.step.at.name == "blocks")  # [CLS] stays there
        entered = entered if act.step.at.name == "layers" else left
    return left


# All tokens of a sample leave at once, or none; what a picture or a video repeats leaves; and learned
# connectors give as many tokens as their own settings say.
WITHOUT_BUDGET = {
    *("dyvte", "pixelprune", "vtw", "dycoke", "prunevid", "visual-context-window-extension"),
    *("b-vllm", "crosslmm", "hicom", "langdc", "omnivid", "quicksviewer", "slow-fast-video-mllm", "videostreaming"),
}


@pytest.mark.parametrize("content", SHAPES)
@pytest.mark.parametrize("slug", [entry.slug for entry in picture_methods() if entry.slug not in WITHOUT_BUDGET])
def test_every_budget_keeps_what_its_column_says(slug, content):
    least = "2" if slug in ("tome", "auroracap") else "1"  # each block merges half of the patches at most
    budgets = ("13", "12.5%", least)
    if 192 < content < 1000:  # of the largest pictures some methods take seconds
        budgets += ("64", "192")
    measured = [job for job in jobs((slug,), budgets, content, baselines=()) if job.cell.kind == "method"]
    assert len(measured) == len(budgets)
    for job in measured:
        (method,) = job.plan.methods
        counted = job.cell.budget.isdecimal()
        assert left_after(method, content) == job.cell.keep, job.cell
        assert job.cell.keep == int(job.cell.budget) if counted else abs(job.cell.keep - content / 8) < 1
