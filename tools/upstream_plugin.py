"""A pytest plugin for transformers' own tests: it notes how each test ends, and attaches identity plans if asked to.

An identity plan keeps every token, and goes through all that a reduction does. It is attached to every model with a
language head as it is made, whoever makes it. `tools/upstream.py` runs tests under this plugin.

Environment:
    WINNOW_UPSTREAM_OUT: the file to which a line of JSON is added for each test.
    WINNOW_UPSTREAM_ATTACH: 1 to attach plans.
"""

from __future__ import annotations

import functools
import gc
import json
import os
import weakref
from pathlib import Path
from typing import Any

import pytest

from winnow.core.errors import UnsupportedError, WinnowError

OUT = Path(os.environ["WINNOW_UPSTREAM_OUT"])
ATTACH = os.environ.get("WINNOW_UPSTREAM_ATTACH") == "1"
PROPERTY = "winnow"

# The first that binds. HiPrune looks into towers that are known; the LM drops before its second layer.
PLANS = (
    "hiprune:keep=100% + fastv:layer=1,keep=100%",
    "divprune:keep=100% + fastv:layer=1,keep=100%",
    "divprune:keep=100%",
)


class Counts:
    """What happened since a test began, and in all.

    Attributes:
        plans: plan → models to which it was attached in this test.
        reduced: forwards of this test that a plan reduced, to all tokens.
        refused: classes to which nothing could be attached in this test, with the reason.
        made: models in all.
        alive: those of them that still live.
    """

    def __init__(self) -> None:
        self.made = 0
        self.alive: weakref.WeakSet[Any] = weakref.WeakSet()
        self.reset()

    def reset(self) -> None:
        self.plans: dict[str, int] = {}
        self.reduced = 0
        self.refused: dict[str, str] = {}


counts = Counts()


def meet(model: Any) -> None:
    """Count a model with a language head that is complete, and attach to it."""
    if not type(model).__name__.endswith("ForConditionalGeneration") or model in counts.alive:
        return
    if any(parameter.is_meta for parameter in model.parameters()):
        return  # the weights come later: see `from_pretrained`
    counts.made += 1
    counts.alive.add(model)
    if ATTACH:
        attach(model)


def attach(model: Any) -> None:
    """Attach the first plan that binds; a class that is not supported stays plain."""
    import winnow
    from winnow.models.supported_versions import trying

    reason = ""
    for plan in PLANS:
        try:
            with trying():
                winnow.compress(model, plan)
        except UnsupportedError as error:
            reason = reason or str(error)
        except WinnowError as error:
            reason = str(error)
        else:
            counts.plans[plan] = counts.plans.get(plan, 0) + 1
            return
    counts.refused[type(model).__name__] = reason


def install() -> None:
    """Meet models where they are made: behind their constructors, and behind `from_pretrained`."""
    from transformers import PreTrainedModel

    from winnow.engine.request import Ledgers

    post_init, from_pretrained = PreTrainedModel.post_init, PreTrainedModel.from_pretrained.__func__
    add = Ledgers.add

    @functools.wraps(post_init)
    def made(self: Any, *args: Any, **kwargs: Any) -> None:
        post_init(self, *args, **kwargs)
        meet(self)

    @functools.wraps(from_pretrained)
    def loaded(cls: Any, *args: Any, **kwargs: Any) -> Any:
        found = from_pretrained(cls, *args, **kwargs)
        meet(found[0] if isinstance(found, tuple) else found)
        return found

    @functools.wraps(add)
    def seen(self: Any, ledger: Any) -> None:
        add(self, ledger)
        counts.reduced += bool(ledger.items)

    PreTrainedModel.post_init = made
    PreTrainedModel.from_pretrained = classmethod(loaded)
    Ledgers.add = seen  # type: ignore[method-assign]


def refusal_in(error: BaseException | None) -> str:
    """The message of the WinnowError that an exception is, or comes from."""
    seen: set[int] = set()
    while error is not None and id(error) not in seen:
        if isinstance(error, WinnowError):
            return str(error)
        seen.add(id(error))
        error = error.__cause__ or error.__context__
    return ""


def pytest_configure() -> None:
    install()


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_logstart() -> None:
    counts.reset()


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item, call: pytest.CallInfo[Any]) -> Any:
    report = yield
    error = None if call.excinfo is None else call.excinfo.value
    note = {
        "refusal": refusal_in(error) if report.failed else "",
        "error": f"{type(error).__name__}: {error}"[:2000] if report.failed and error is not None else "",
        "plans": counts.plans,
        "reduced": counts.reduced,
        "refused": counts.refused,
    }
    report.user_properties.append((PROPERTY, note))
    return report


def pytest_runtest_logreport(report: Any) -> None:
    if "PYTEST_XDIST_WORKER" in os.environ or (report.when != "call" and report.passed):
        return
    own = [value for name, value in report.user_properties if name == PROPERTY]
    outcome = report.outcome
    if hasattr(report, "wasxfail"):
        outcome = "xpassed" if report.passed else "xfailed"
    _write({"test": report.nodeid, "outcome": outcome, **(own[-1] if own else {})})


def pytest_sessionfinish() -> None:
    gc.collect()
    _write({"made": counts.made, "alive": len(counts.alive)})


def _write(line: dict[str, Any]) -> None:
    with OUT.open("a", encoding="utf-8") as file:
        file.write(json.dumps(line, ensure_ascii=False) + "\n")
