"""Each generic check fails for a method that breaks what it checks, so that passing it means something."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, ClassVar

import pytest
import torch

from winnow import testing
from winnow.core import registry
from winnow.core.budget import Budget
from winnow.core.method import Method
from winnow.core.point import Point
from winnow.core.reduction import Reduction
from winnow.core.select import top_k
from winnow.core.signal import Signal
from winnow.core.step import Step
from winnow.signals.vision import VisionAttention
from winnow.testing import checks

ROW = VisionAttention("feature", query="all")


@dataclass(frozen=True)
class Good(Method):
    """Keep the tokens that receive the most attention."""

    keep: Budget = Budget(4)

    slug = "good"
    identity: ClassVar[dict[str, Any] | None] = {"keep": "100%"}

    def signals(self):
        return (ROW,)

    def reduce(self, view):
        return top_k(view[ROW], self.keep.of(view), view)


class KeepsOneMore(Good):
    def reduce(self, view):
        return top_k(view[ROW], self.keep.of(view) + 1, view)


class KeepsTwice(Good):
    def reduce(self, view):
        index = super().reduce(view).index
        return Reduction.select(index[:, :1].expand_as(index), view.n)


class OutOfOrder(Good):
    def reduce(self, view):
        return Reduction.select(super().reduce(view).index.flip(1), view.n)


class OutOfRange(Good):
    def reduce(self, view):
        return Reduction.select(super().reduce(view).index + 1, view.n)


class TopkOfTorch(Good):
    """NaN sorts first in torch.topk, and ties come in any order."""

    def reduce(self, view):
        return Reduction.select(view[ROW].topk(min(self.keep.of(view), view.n)).indices.sort(1).values, view.n)


class CountsNoNaN(Good):
    def reduce(self, view):
        return top_k(view[ROW], self.keep.of(view))


class GlobalRandom(Good):
    def reduce(self, view):
        return top_k(torch.rand(1, view.n).expand(view.b, -1), self.keep.of(view), view)


class ChangesItsInput(Good):
    def reduce(self, view):
        found = super().reduce(view)
        view[ROW].zero_()
        return found


class ScoresInHalf(Good):
    """Adding in half precision rounds scores together that fp32 tells apart."""

    def reduce(self, view):
        return top_k(view[ROW] * 0 + (view[ROW] + 300), self.keep.of(view), view)


class ReadsStorage(Good):
    """Reads a tensor by its storage, which is not its content where it is strided or expanded."""

    def reduce(self, view):
        row = view[ROW]
        return top_k(torch.as_strided(row, row.shape, (row.shape[1], 1)), self.keep.of(view), view)


class LooksAtTheBatch(Good):
    def reduce(self, view):
        return top_k((view[ROW] - view[ROW].mean(0)).abs(), self.keep.of(view), view)


class NeverAll(Good):
    def reduce(self, view):
        return top_k(view[ROW], max(1, min(self.keep.of(view), view.n - 1)), view)


class HiddenTable(Good):
    def reduce(self, view):
        return top_k((view.tokens @ view.tokens.mT).sum(1) * 0 + view[ROW], self.keep.of(view), view)


class RaggedFirst(Good):
    def reduce(self, view):
        counts = tuple(min(view.n, 1 + i) for i in range(view.b))
        return Reduction.select(torch.arange(max(counts)).expand(view.b, -1), view.n, counts=counts)


BROKEN = [
    (KeepsOneMore, "check_counts"),
    (KeepsTwice, "check_counts"),
    (OutOfOrder, "check_counts"),
    (OutOfRange, "check_counts"),
    (RaggedFirst, "check_counts"),
    (TopkOfTorch, "check_broken"),
    (CountsNoNaN, "check_broken"),
    (GlobalRandom, "check_pure"),
    (ChangesItsInput, "check_pure"),
    (ScoresInHalf, "check_dtypes"),
    (ReadsStorage, "check_memory_format"),
    (LooksAtTheBatch, "check_batch"),
    (NeverAll, "check_identity"),
    (HiddenTable, "check_memory"),
]


@pytest.mark.parametrize(("kind", "check"), BROKEN, ids=[kind.__name__ for kind, _ in BROKEN])
def test_check_fails_for_a_broken_method(kind, check):
    kind.__doc__ = kind.__doc__ or "A broken method."
    with pytest.raises(AssertionError, match="good"):
        getattr(checks, check)(testing.Subject(kind))


@pytest.fixture
def clean_registry(monkeypatch):
    monkeypatch.setattr(registry, "_extra", dict(registry._extra))
    monkeypatch.setattr(registry, "_classes", dict(registry._classes))


@pytest.mark.usefixtures("clean_registry")
def test_a_good_method_passes_them_all():
    testing.check_method(registry.register("good")(Good))


@pytest.mark.usefixtures("clean_registry")
def test_a_method_without_slug_summary_or_round_trip_is_found():
    @dataclass(frozen=True)
    class Bare(Good):
        slug = ""

    with pytest.raises(AssertionError, match="no slug"):
        testing.check_method(Bare)

    @registry.register("mute")
    @dataclass(frozen=True)
    class Mute(Good):
        """Hm."""

    with pytest.raises(AssertionError, match="summary"):
        testing.check_method(Mute)

    @registry.register("forgetful")
    @dataclass(frozen=True)
    class Forgetful(Good):
        """Keep tokens, with a setting that no plan string can carry."""

        extra: object = object

        def __post_init__(self):
            super().__post_init__()
            object.__setattr__(self, "extra", object())

    with pytest.raises(AssertionError, match="reads back"):
        testing.check_method(Forgetful)


@dataclass(frozen=True)
class Foreign(Signal):
    """A signal that only a plug-in knows."""

    def sample(self, generator, b, n):
        return torch.rand(b, n, 3, generator=generator)


@dataclass(frozen=True)
class PlugIn(Good):
    """Keep tokens by a signal of one's own, before an LM layer."""

    slug = "good"

    def signals(self):
        return (Foreign(),)

    def steps(self, info):
        return (Step(Point("layers", 1), self._one_step, self.signals()),)

    def reduce(self, view):
        return top_k(view[Foreign()].amax(-1), self.keep.of(view), view)


def test_a_plug_in_brings_its_own_signals():
    subject = testing.Subject(PlugIn)
    for check in testing.CHECKS[1:]:
        check(subject)


def test_a_method_that_no_model_supports_is_found():
    nowhere = replace(testing.WITH_CLS, points=("blocks",))
    with pytest.raises(AssertionError, match="runs on none"):
        checks.check_counts(testing.Subject(Good, infos=(nowhere,)))


@dataclass(frozen=True)
class Learned(Good):
    """Keep the tokens that a learned head likes."""

    def build(self, info):
        return torch.nn.Linear(info.width, 1).requires_grad_(False)

    def signals(self):
        return ()

    def reduce(self, view):
        return top_k(view.module(view.tokens.float())[..., 0], self.keep.of(view), view)


def test_a_learned_method_gets_what_it_builds():
    subject = testing.Subject(Learned)
    checks.check_counts(subject)
    checks.check_pure(subject)
    checks.check_broken(subject)
