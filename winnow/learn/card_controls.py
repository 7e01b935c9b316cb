"""The part of a model card's page that compares: other runs, the twin without token dropout, other towers."""

from __future__ import annotations

from collections.abc import Callable
from statistics import mean
from typing import Any

from winnow.learn.markdown import percents, table


def sections(card: dict[str, Any]) -> list[str]:
    """Sections for what the card's "controls" hold."""
    held = card["controls"]
    makers: dict[str, Callable[[Any], str]] = {"runs": _runs, "methods": _methods, "towers": _towers}
    return [make(held[name]) for name, make in makers.items() if name in held]


def _name(run: dict[str, Any]) -> str:
    return f"seed {run['seed']}{'' if run['dropout'] else ', no dropout'}"


def _runs(runs: list[dict[str, Any]]) -> str:
    """Runs of the recipe side by side, and their spread."""
    shares = runs[0]["dropping"]["random"]
    with_dropout = [run for run in runs if run["dropout"]]
    rows = [
        (
            _name(run),
            run["overall"],
            run["blind"],
            run["target"],
            min(run["per_type"].items(), key=lambda pair: pair[1])[0],
            min(run["per_type"].values()),
            run["cost_before_layer_2"],
        )
        for run in runs
    ]
    dropped = [
        (_name(run), name.replace("_", " "), run["dropping"]["full"], *run["dropping"][name].values())
        for name in ("random", "evidence_and_random")
        for run in runs
    ]
    parts = [
        "## Runs of the recipe",
        "The shipped model first. With `--no-dropout` every step of the language stages keeps all tokens, as it was "
        "with most published models. Same questions as above.",
        table(("run", "accuracy", "blind", "target", "weakest type", "its accuracy", "cost of leaving before 2"), rows),
    ]
    if len(with_dropout) > 1:
        whole = [run["overall"] for run in with_dropout]
        parts.append(
            f"Over {len(whole)} seeds with dropout: accuracy {mean(whole):.3f}, from {min(whole):.3f} to "
            f"{max(whole):.3f}."
        )
    parts.append(
        "Accuracy with a share of the tokens at the connector (one question per scene), random ones, and the evidence "
        "with random others:"
    )
    parts.append(table(("run", "kept", "100 %", *percents(shares)), dropped))
    return "\n\n".join(parts)


def _methods(held: dict[str, Any]) -> str:
    """Every method on the shipped model and on the twin, by budget."""
    found = {
        who: {(row["label"], row["budget"]): row for row in held[who] if row["budget"]}
        for who in ("shipped", "without_dropout")
    }
    plain = {
        who: next(row["accuracy"] for row in held[who] if row["label"] == "full")
        for who in ("shipped", "without_dropout")
    }
    budgets = sorted({budget for _, budget in found["shipped"]}, key=float, reverse=True)
    labels = list(dict.fromkeys(label for label, _ in found["shipped"]))
    rows = [
        (label, *(found[who][label, budget]["accuracy"] if (label, budget) in found[who] else "–"
                  for budget in budgets for who in found))
        for label in labels
    ]  # fmt: skip
    rows.insert(0, ("all tokens", *(plain[who] for _ in budgets for who in found)))
    head = ["method", *(f"{budget} tokens{which}" for budget in budgets for which in ("", ", twin"))]
    return (
        "## Methods on the twin without token dropout\n\n"
        f"{held['questions']} questions; the shipped model and, as *twin*, the run without dropout. A method that "
        "costs more on the twin is helped by the shipped model's habit of missing tokens.\n\n" + table(head, rows)
    )


def _towers(held: dict[str, Any]) -> str:
    """What [CLS] finds in three towers."""
    shares = held["recall"]["random"]
    named = [(name, *row.values()) for name, row in held["named"].items()]
    head = next(iter(held["named"].values()))
    return "\n\n".join(
        (
            "## Is it the [CLS] objective?",
            "The tower is pretrained by naming its patches and by naming the whole picture from [CLS]. A control of "
            "the same recipe and pictures lacks the second (`--no-cls-objective --until tower-full`). At the end of "
            "pretraining the patches were named as well (running accuracies):",
            table(("tower", *head), named),
            "The tokens that FasterVLM keeps by each tower's [CLS] attention: share of the evidence among them, and "
            f"the accuracy of the shipped model on its own tokens at those places ({held['questions']} questions).",
            table(
                ("[CLS] of", "", *percents(shares)),
                [(name, what, *held[what][name].values()) for what in ("recall", "accuracy") for name in held[what]],
            ),
        )
    )
