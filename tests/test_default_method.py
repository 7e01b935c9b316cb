"""The default method is what the rule says by the committed figures, and the rule sees what it must."""

from __future__ import annotations

import importlib.util
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

import pytest

from winnow.core.errors import WinnowError
from winnow.core.method import Method
from winnow.core.point import Point
from winnow.core.registry import entries
from winnow.core.signal import Signal
from winnow.core.step import Step

TOOL = Path(__file__).resolve().parent.parent / "tools" / "default_method.py"


@pytest.fixture(scope="module")
def rule() -> ModuleType:
    spec = importlib.util.spec_from_file_location("default_method_tool", TOOL)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@dataclass(frozen=True)
class Asking(Signal):
    """Depends on the question."""

    reads_text = True


@dataclass(frozen=True)
class Acting(Method):
    """Acts where its subclass says."""

    slug = "acting"


def rows(**right: tuple[float, float]) -> list[dict[str, object]]:
    found = [{"label": "full", "budget": "", "accuracy": 1.0, "tokens_kept": 256.0}]
    for slug, two in right.items():
        found += [
            {"label": slug.replace("_", "-"), "budget": budget, "accuracy": value, "tokens_kept": float(budget)}
            for budget, value in zip(("64", "32"), two, strict=True)
        ]
    return found


def test_what_acts_in_the_language_model_or_looks_at_the_text_or_needs_cls_is_barred(
    rule: ModuleType,
) -> None:
    def barred(where: str, signal: Signal | None = None) -> str:
        needs = () if signal is None else (signal,)
        steps = lambda self, info: (Step(Point.of(where), lambda view, state: None, needs),)  # noqa: E731
        return rule.barred(type("Acting", (Acting,), {"steps": steps}))

    assert barred("projected") == ""
    assert barred("projected", Signal()) == ""
    assert "acts at layers[2]" in barred("layers[2]")
    assert "looks at the text" in barred("projected", Asking())
    assert "does not run on a model without [CLS]" in barred("features")


def test_the_best_in_the_mean_that_nothing_bars_is_the_default(
    rule: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    first, second, third = [entry.slug for entry in entries()][:3]
    key = [slug.replace("-", "_") for slug in (first, second, third)]
    monkeypatch.setattr(rule, "barred", lambda cls: "it acts elsewhere" if cls.slug == first else "")
    shipped = rows(**{key[0]: (0.9, 0.9), key[1]: (0.8, 0.5), key[2]: (0.7, 0.7)})
    twin = rows(**{key[0]: (0.9, 0.9), key[1]: (0.8, 0.5), key[2]: (0.6, 0.5)})
    found = rule.standings(shipped, twin, {second: 0.009, third: 0.001})
    assert [one.slug for one in found] == [first, second, third]
    assert rule.best(found).slug == second  # 0.65 in the mean, against 0.625
    assert rule.complaint(found, second) == ""
    said = rule.complaint(found, third)
    assert f"The default method is {third} (62.5% right, nothing bars it)" in said
    assert f"should be {second} (65.0% right)" in said
    slow = rule.standings(shipped, twin, {second: 0.0101, third: 0.001})
    assert rule.best(slow).slug == third
    assert "1.01% of the prefill" in slow[1].barred
    unknown = rule.standings(shipped, twin, {third: 0.02})
    with pytest.raises(WinnowError, match=r"No method satisfies the rule.*was not measured"):
        rule.best(unknown)


def test_baselines_and_methods_without_both_budgets_do_not_stand(rule: ModuleType) -> None:
    slug = entries()[0].slug
    both = rows(**{slug.replace("-", "_"): (0.5, 0.5), "random_M": (0.9, 0.9)})
    assert [one.slug for one in rule.standings(both, both, {})] == [slug]
    assert rule.standings(both, both[:2], {}) == []


def test_the_committed_figures_name_a_default(rule: ModuleType) -> None:
    found = rule.load()
    assert len(found) >= 8
    first = rule.best(found)
    assert first.selection is not None
    assert first.selection <= rule.MOST
    assert all(one.mean <= first.mean for one in found if not one.barred)
