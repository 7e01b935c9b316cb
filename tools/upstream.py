"""Run transformers' own tests of vision-language models with an identity plan attached and without, and compare.

    python tools/upstream.py FOLDER [MODEL …] [--only EXPRESSION] [--processes N] [--out FOLDER]

FOLDER is a checkout of transformers, of the version that is installed; this repository has no copy of its tests. They
need `parameterized`, `timeout-decorator`, `pytest-rerunfailures`, `datasets`, `httpx` and `requests`. MODEL is a folder
of `tests/models`.

The run is green if every test ends with the plan as it does without, or by a refusal that is listed in
`tools/upstream_refusals.toml`. A test that ends otherwise is run three more times in both ways, so that one that is
random does not count.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
import tomllib
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

TOOLS = Path(__file__).resolve().parent
REFUSALS = TOOLS / "upstream_refusals.toml"
MODELS = ("llava", "llava_next", "qwen2_5_vl", "qwen3_vl", "internvl", "gemma3", "smolvlm")
WORST = ("passed", "xpassed", "xfailed", "skipped", "failed")
RERUNS = 3


@dataclass
class Outcome:
    """How a test ended; of several parts, the worst.

    Attributes:
        refusals: messages of winnow's own errors among what failed it.
        errors: of what failed it.
        plans, reduced, refused: as in the plugin.
    """

    outcome: str = "passed"
    refusals: list[str] = field(default_factory=list)
    errors: list[str] = field(default_factory=list)
    plans: dict[str, int] = field(default_factory=dict)
    reduced: int = 0
    refused: dict[str, str] = field(default_factory=dict)

    def add(self, line: dict[str, Any]) -> None:
        self.outcome = max(self.outcome, line["outcome"], key=WORST.index)
        if line["outcome"] == "failed":
            self.refusals.append(line["refusal"])
            self.errors.append(line["error"])
        self.plans = {**self.plans, **line["plans"]}
        self.reduced = max(self.reduced, line["reduced"])
        self.refused |= line["refused"]


@dataclass(frozen=True)
class Run:
    """A run of tests: its outcomes, how many models it made, and how many of them still lived at its end."""

    outcomes: dict[str, Outcome]
    made: int
    alive: int


def run(folder: Path, tests: Sequence[str], attach: bool, out: Path, options: Sequence[str]) -> Run:
    """Run tests in a process of their own, and read what the plugin wrote."""
    out.unlink(missing_ok=True)
    environment = {
        # A run of its own, also where this one is a worker of pytest-xdist.
        **{name: value for name, value in os.environ.items() if not name.startswith("PYTEST_XDIST")},
        "HF_HUB_OFFLINE": "1",
        "PYTHONPATH": os.pathsep.join([str(TOOLS.parent), str(TOOLS)]),
        "WINNOW_UPSTREAM_OUT": str(out.resolve()),
        "WINNOW_UPSTREAM_ATTACH": str(int(attach)),
    }
    command = [sys.executable, "-m", "pytest", "-p", "upstream_plugin", "-p", "no:cacheprovider", "-q", "--tb=short"]
    with out.with_suffix(".log").open("w", encoding="utf-8") as log:
        code = subprocess.run(
            [*command, *options, *tests], cwd=folder, env=environment, stdout=log, check=False
        ).returncode
    if code not in (0, 1):
        sys.exit(f"pytest ended with {code}; see {log.name}")
    return read(out)


def read(out: Path) -> Run:
    """What the plugin wrote."""
    outcomes: dict[str, Outcome] = {}
    made = alive = 0
    for line in map(json.loads, out.read_text(encoding="utf-8").splitlines()):
        if "test" in line:
            outcomes.setdefault(line["test"], Outcome()).add(line)
        else:
            made, alive = made + line["made"], alive + line["alive"]
    return Run(outcomes, made, alive)


def known(outcome: Outcome, refusals: Sequence[dict[str, str]]) -> str | None:
    """The name of the refusals that explain a failure, if they explain all of it."""
    names = []
    for message in outcome.refusals:
        name = next((own["name"] for own in refusals if says(message, own["message"])), None)
        if name is None:
            return None
        names.append(name)
    return " + ".join(dict.fromkeys(names)) if names else None


def says(message: str, words: str) -> bool:
    """Whether a message holds words of the page on troubleshooting, where "…" stands for what changes."""
    return re.search(".*".join(map(re.escape, words.split("…"))), message, re.DOTALL) is not None


def ended(run: Run, test: str) -> str:
    """How a test ended. One that is marked as failing and passes by chance ends like one that fails."""
    outcome = run.outcomes[test].outcome if test in run.outcomes else "not run"
    return "xfailed" if outcome == "xpassed" else outcome


def differing(plain: Run, planned: Run) -> list[str]:
    """Tests that do not end alike."""
    tests = plain.outcomes.keys() | planned.outcomes.keys()
    return sorted(test for test in tests if ended(plain, test) != ended(planned, test))


def short(test: str) -> str:
    return test.removeprefix("tests/models/")


def compare(folder: Path, model: str, out: Path, options: Sequence[str], refusals: Sequence[dict[str, str]]) -> bool:
    """Compare the tests of one model, print the table, and say whether it is green."""
    files = [
        str(x.relative_to(folder)) for x in sorted((folder / "tests" / "models" / model).glob("test_modeling*.py"))
    ]
    plain = run(folder, files, False, out / f"{model}.plain.jsonl", options)
    planned = run(folder, files, True, out / f"{model}.planned.jsonl", options)
    different = differing(plain, planned)
    by_refusal: dict[str, list[str]] = {}
    unknown = []
    for test in different:
        name = known(planned.outcomes[test], refusals) if test in planned.outcomes else None
        if name is None:
            unknown.append(test)
        else:
            by_refusal.setdefault(name, []).append(test)
    real = [test for test in unknown if not random(folder, test, plain, out)]
    report(model, plain, planned, by_refusal, sorted(set(unknown) - set(real)), real)
    return not real


def random(folder: Path, test: str, plain: Run, out: Path) -> bool:
    """Whether a test that is run a few times more ends under the plan in no other way than without."""

    def ways(attach: bool) -> set[str | None]:
        runs = (run(folder, [test], attach, out / "again.jsonl", ()) for _ in range(RERUNS))
        return {ended(found, test) for found in runs}

    return ways(True) <= ways(False) | {ended(plain, test)}


def report(
    model: str, plain: Run, planned: Run, by_refusal: dict[str, list[str]], chance: Iterable[str], real: Iterable[str]
) -> None:
    ends = Counter(own.outcome for own in plain.outcomes.values())
    plans = Counter(plan for own in planned.outcomes.values() for plan in own.plans)
    reduced = sum(own.reduced > 0 for own in planned.outcomes.values())
    print(
        f"\n{model}: {len(plain.outcomes)} tests; plain: {', '.join(f'{n} {name}' for name, n in ends.most_common())}"
    )
    for plan, tests in plans.items():
        print(f"  {tests} tests made models under {plan}")
    print(f"  {reduced} tests ran a forward that it reduced")
    lived = [f"{own.alive} of {own.made} models" for own in (plain, planned)]
    print(f"  lived on to the end: {lived[0]} plain, {lived[1]} under the plan")
    for name, reason in {k: v for own in planned.outcomes.values() for k, v in own.refused.items()}.items():
        print(f"  not attached to {name}: {reason}")
    for name, tests in sorted(by_refusal.items()):
        print(f"  {len(tests)} refused: {name}")
        for test in tests:
            print(f"    {short(test)}")
    for test in chance:
        print(f"  random: {short(test)}")
    for test in real:
        print(f"  DIFFERENT: {short(test)}: {ended(plain, test)} plain, {ended(planned, test)} under the plan")
        for error in dict.fromkeys(planned.outcomes[test].errors if test in planned.outcomes else ()):
            print(f"    {error[:400]}")


def main() -> int:
    parser = argparse.ArgumentParser(description="transformers' own tests with an identity plan and without")
    parser.add_argument("folder", type=Path)
    parser.add_argument("models", nargs="*", default=MODELS, metavar="model")
    parser.add_argument("--only", help="as pytest's -k")
    parser.add_argument("--processes", type=int, default=1)
    parser.add_argument("--out", type=Path, default=Path("out/upstream"))
    given = parser.parse_args()
    given.out.mkdir(parents=True, exist_ok=True)
    options = ["-k", given.only] if given.only else []
    options += ["-n", str(given.processes)] if given.processes > 1 else []
    refusals = tomllib.loads(REFUSALS.read_text(encoding="utf-8"))["refusal"]
    green = [compare(given.folder.resolve(), model, given.out, options, refusals) for model in given.models]
    return 0 if all(green) else 1


if __name__ == "__main__":
    sys.exit(main())
