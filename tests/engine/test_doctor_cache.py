"""The doctor's checks of compressed caches: each names what it saw, and fails when its seam is broken."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
from test_doctor import ROWS, deaf, noise, red, stretched

from tests import zoo
from winnow.cache import run
from winnow.engine import doctor, doctor_cache
from winnow.engine.doctor import run_checks
from winnow.engine.doctor_cache import CACHE_CHECKS

FULL, EVICTED, STORED = (name for name, *_ in CACHE_CHECKS)


def seen(model: Any, build: str) -> dict[str, str]:
    """What each of the checks says, all of which hold."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(doctor, "CHECKS", CACHE_CHECKS)
        checks = run_checks(model, zoo.samples(build, ROWS))
    assert all(check.ok for check in checks), checks
    return {check.name: check.detail for check in checks}


@pytest.mark.parametrize("build", zoo.BUILDS)
def test_they_look_and_find_what_they_did(build: str) -> None:
    found = seen(zoo.model(build), build)
    n = zoo.samples(build, ROWS)[0]["input_ids"].shape[1]
    assert found[FULL] == "logits equal, ids equal"
    assert float(found[EVICTED].rpartition(" by ")[2]) > 1e-3  # the eviction is one that can be seen
    assert found[STORED].startswith(f"{n // 2} slots of a head in {zoo.DEPTH} layers; ")


@contextmanager
def while_compressed(patch: pytest.MonkeyPatch, breaks: Callable[[Any], Callable[[], None]]) -> Iterator[None]:
    """`breaks(model)` whenever a check has compressed it; what it returns is called before the model is detached."""
    plain = doctor_cache.compress

    class Broken:
        def __init__(self, model: Any, plan: Any) -> None:
            self.handle = plain(model, plan)
            self.mend = breaks(model)

        def __enter__(self) -> Any:
            return self.handle

        def __exit__(self, *_: object) -> None:
            self.detach()

        def detach(self) -> None:
            self.mend()
            self.handle.detach()

    patch.setattr(doctor_cache, "compress", Broken)
    yield


def replaced(owner: Any, name: str, value: Any) -> Callable[[Any], Callable[[], None]]:
    """Something of this name is another while the model is compressed."""

    def breaks(model: Any) -> Callable[[], None]:
        plain = getattr(owner, name)
        setattr(owner, name, value)
        return lambda: setattr(owner, name, plain)

    return breaks


BROKEN = {
    "another output": (FULL, lambda model: noise(model.base_model.language_model.norm)),
    "attention goes past the interface": (FULL, deaf),
    "positions are other ones": (EVICTED, stretched),
    "other slots are held than were chosen": (
        EVICTED,
        replaced(run, "reduced", lambda chosen, x: x[:, :, : chosen.m].clone()),
    ),
    "what was dropped lies in memory still": (
        STORED,
        replaced(run, "reduced", lambda chosen, x: x[:, :, : chosen.m]),
    ),
}


@pytest.mark.parametrize("name", BROKEN)
def test_a_broken_seam_is_found_and_named(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    check, breaks = BROKEN[name]
    suspects = next(suspects for own, _, suspects in CACHE_CHECKS if own == check)
    with while_compressed(monkeypatch, breaks):
        found = red(zoo.model("llava_clip"), check)
    assert found[check].endswith(f"Suspect: {suspects}.")


def test_a_model_whose_cache_is_left_alone_is_not_checked(monkeypatch: pytest.MonkeyPatch) -> None:
    model = zoo.model("llava_clip")
    monkeypatch.setattr(type(model), "_supports_default_dynamic_cache", classmethod(lambda cls: False))
    found = seen(model, "llava_clip")
    assert all(detail.startswith("not checked: ") and "a cache of another kind" in detail for detail in found.values())
