"""Which method the default must be, by the project's own figures.

The rule: it runs on every family with its default settings (it needs no [CLS] token and looks neither at the question
nor at anything else in the language model); its selection takes at most 1 % of the prefill; and among such methods it
has the most right answers, in the mean over 25 % and 12.5 % of the tokens and over the shipped model and its twin.

    python tools/default_method.py     print the rule's answer with its figures; exit 1 if the default is another

Figures: docs/measured.json (`make measured`), the twin's there (`make measured-twin`), or else in the model's card.json
(`make card`), and the share of the selection in docs/selection.json (`make selection`: the upper end of its interval,
32 LM layers).
"""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import mean
from typing import Any, NamedTuple

from winnow.core.errors import UnsupportedError, WinnowError
from winnow.core.info import ModelInfo
from winnow.core.method import Method
from winnow.core.plan import Plan
from winnow.core.registry import entries, method_class

ROOT = Path(__file__).resolve().parent.parent
MEASURED = ROOT / "docs" / "measured.json"
SELECTION = ROOT / "docs" / "selection.json"
CARD = ROOT / "winnow" / "reference" / "small" / "card.json"
SHARES = (0.25, 0.125)
MOST = 0.01  # of the prefill, for the selection
KINDS = (
    ModelInfo("a model with [CLS]", "llava", 32, 4096, 24, -2, True, vision_width=1024),
    ModelInfo("a model without [CLS]", "qwen2_5_vl", 28, 3584, 32, -1, False, ("projected", "layers"), True, 2, 1280),
)


class Standing(NamedTuple):
    """A method and its figures: right answers by (model, budget), and the selection's share of the prefill."""

    slug: str
    right: tuple[float, ...]
    selection: float | None
    barred: str

    @property
    def mean(self) -> float:
        return mean(self.right)


def barred(cls: type[Method]) -> str:
    """Why a method cannot be the default on every family; empty where it can."""
    for info in KINDS:
        try:
            steps = cls().checked_steps(info)
        except (TypeError, UnsupportedError, WinnowError) as error:
            return f"it does not run on {info.model} with its defaults ({error})"
        for step in steps:
            if step.at.name in ("layers", "kv", "decode"):
                return f"it acts at {step.at}, inside the language model"
            if any(signal.reads_text for signal in step.needs):
                return "it looks at the text"
    return ""


def right_answers(rows: Sequence[Mapping[str, Any]]) -> dict[str, tuple[float, ...]]:
    """The accuracy of each method at each of `SHARES` of the tokens, for methods that have both."""
    whole = next(row["tokens_kept"] for row in rows if not row["budget"])
    budgets = [str(round(share * whole)) for share in SHARES]
    found = {(row["label"], row["budget"]): row["accuracy"] for row in rows}
    labels = dict.fromkeys(label for label, budget in found if budget)
    return {
        label: tuple(found[label, budget] for budget in budgets)
        for label in labels
        if all((label, budget) in found for budget in budgets)
    }


def standings(
    shipped: Sequence[Mapping[str, Any]], twin: Sequence[Mapping[str, Any]], selection: Mapping[str, float]
) -> list[Standing]:
    """Every method that both models have figures of, most right answers first."""
    here, there = right_answers(shipped), right_answers(twin)
    slugs = [entry.slug for entry in entries() if entry.slug in here and entry.slug in there]
    found = []
    for slug in slugs:
        share = selection.get(slug)
        why = barred(method_class(slug))
        if not why and share is None:
            why = "the share of its selection was not measured"
        if not why and share is not None and share > MOST:
            why = f"its selection takes {share:.2%} of the prefill"
        found.append(Standing(slug, here[slug] + there[slug], share, why))
    return sorted(found, key=lambda one: -one.mean)


def best(found: Sequence[Standing]) -> Standing:
    """The first that nothing bars."""
    for one in found:
        if not one.barred:
            return one
    raise WinnowError(
        "No method satisfies the rule of the default: " + "; ".join(f"{s.slug}: {s.barred}" for s in found)
    )


def load(measured: Path = MEASURED) -> list[Standing]:
    """The standings by the committed figures, or by other ones of the shipped model."""
    shipped, card, timed = (json.loads(path.read_text(encoding="utf-8")) for path in (measured, CARD, SELECTION))
    selection = {Plan.of(plan).methods[0].slug: interval[2] for plan, interval in timed.items()}
    twin = shipped["twin"]["rows"] if "twin" in shipped else card["controls"]["methods"]["without_dropout"]
    return standings(shipped["rows"], twin, selection)


def complaint(found: Sequence[Standing], default: str) -> str:
    """What is wrong with the default; empty where it is the rule's."""
    first = best(found)
    if first.slug == default:
        return ""
    own = next((one for one in found if one.slug == default), None)
    figures = f"{own.mean:.1%} right, {own.barred or 'nothing bars it'}" if own else "not measured"
    return (
        f"The default method is {default} ({figures}), but by the committed figures it should be {first.slug} "
        f"({first.mean:.1%} right). Change winnow.engine.compress.DEFAULT, or the rule in tools/default_method.py."
    )


def main() -> int:
    from winnow.engine.compress import DEFAULT

    found = load()
    for one in found:
        share = "–" if one.selection is None else f"{one.selection:.2%}"
        print(f"{one.slug:12s} {one.mean:6.2%}  selection {share:>6s}  {one.barred}")
    said = complaint(found, DEFAULT)
    print(said or f"The default is {DEFAULT}, as the rule says.", file=sys.stderr if said else sys.stdout)
    return 1 if said else 0


if __name__ == "__main__":
    sys.exit(main())
