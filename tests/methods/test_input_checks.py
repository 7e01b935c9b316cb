"""The generic checks of methods ahead of the processor fail on methods that break them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import pytest
import torch
from probes import HALF

from winnow.contract import Budget, Method, Point, Recut, Reduction, Step, top_k
from winnow.core.registry import method_class
from winnow.testing import INPUT_CHECKS, Subject, check_method, checks_of
from winnow.testing.input_checks import NATIVE


@dataclass(frozen=True)
class Sound(Method):
    """Keeps the pictures whose features are largest."""

    keep: Budget = HALF
    at: ClassVar[str] = "prompt"
    slug: ClassVar[str] = "sound-of-these"

    def score(self, view):
        return view.features[..., 0]


class OneMore(Sound):
    def reduce(self, view):
        return top_k(self.score(view), min(view.n, self.keep.of(view) + 1), view)


class Turned(Sound):
    def reduce(self, view):
        found = super().reduce(view).index.flip(1)
        return Reduction.select(found, view.n, ordered=False)


class Drawn(Sound):
    def score(self, view):
        return torch.rand(1, view.n)


class Writing(Sound):
    def score(self, view):
        return view.features[..., 0].neg_()


class LikesNaN(Sound):
    def score(self, view):
        return view.features[..., 0].nan_to_num(1e9)


class Never(Sound):
    def reduce(self, view):
        return top_k(self.score(view), max(1, view.n - 1), view)


@dataclass(frozen=True)
class Scaled(Sound):
    """Scales a picture to whatever size it is told."""

    at: ClassVar[str] = "pixels"

    def steps(self, info):
        return (Step(Point("pixels"), lambda view, state: self.scale(view)),)

    def scale(self, view):
        return Recut(size=(30, 30))


class TooLarge(Scaled):
    def scale(self, view):
        rows = self.keep.of(view) + 1
        return Recut(size=(28 * rows, 28))


class Outside(Scaled):
    def scale(self, view):
        return Recut((0, 0, view.size[1] + 1, view.size[0]), (28, 28))


BROKEN = [
    (OneMore, "check_counts"),
    (Scaled, "check_counts"),
    (TooLarge, "check_counts"),
    (Turned, "check_form"),
    (Outside, "check_form"),
    (Drawn, "check_pure"),
    (Writing, "check_pure"),
    (LikesNaN, "check_broken"),
    (Never, "check_identity"),
    (Scaled, "check_identity"),
]


@pytest.mark.parametrize(("kind", "name"), BROKEN, ids=[f"{kind.__name__}-{name}" for kind, name in BROKEN])
def test_a_check_fails_for_a_broken_method(kind, name):
    (check,) = [check for check in INPUT_CHECKS if check.__name__ == name]
    with pytest.raises(AssertionError):
        check(Subject(kind, infos=(NATIVE,)))


def test_a_good_method_passes_them_all():
    for check in INPUT_CHECKS:
        check(Subject(Sound, infos=(NATIVE,)))
    for slug in ("downscale", "retrieve"):
        check_method(method_class(slug))
        assert set(INPUT_CHECKS) < set(checks_of(method_class(slug)))
    assert not set(INPUT_CHECKS) & set(checks_of(method_class("divprune")))
