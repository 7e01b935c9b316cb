"""What every method ahead of the processor must hold, with no model at hand."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import fields, replace
from typing import Any

import torch
from torch import Tensor

from winnow.core.budget import Budget
from winnow.core.frames_view import FramesView
from winnow.core.info import ModelInfo
from winnow.core.picture_view import PictureView
from winnow.core.point import AHEAD
from winnow.core.prompt_view import PromptView
from winnow.core.step import Observe, Recut, Reduce, Step
from winnow.models.picture_sizes import PictureSizes
from winnow.testing.subject import Subject, answer, expect

NATIVE = ModelInfo("a model that takes pictures at their own resolution", points=AHEAD, token_side=28)
PROCESSOR = PictureSizes(28, 4 * 28**2, 1280 * 28**2)
COUNTS = (1, 2, 7, 16)  # of pictures or frames
SIZES = ((84, 56), (200, 300), (480, 640), (1000, 31), (57, 4000), (3000, 2000))  # height and width of pictures
View = PromptView | FramesView | PictureView


def views(point: str, seed: int = 0) -> Iterator[View]:
    """Views of a point with random pixels and features."""
    generator = torch.Generator().manual_seed(seed)

    def pixels(*shape: int) -> Tensor:
        return torch.randint(0, 256, (1, *shape, 3), dtype=torch.uint8, generator=generator)

    for n in COUNTS if point != "pixels" else ():
        features = torch.randn(1, n, 12, generator=generator)
        if point == "frames":
            yield FramesView(pixels(n, 24, 32), torch.arange(n)[None].float(), features)
        else:
            sizes = torch.randint(20, 900, (1, n, 2), generator=generator)
            yield PromptView(pixels(n, 24, 32), sizes, "what is this?", features, features[:, 0] + 1)
    for size in SIZES if point == "pixels" else ():
        rows, columns = PROCESSOR.grid(*size)
        yield PictureView(pixels(24, 32), size, PROCESSOR.side, rows * columns, PROCESSOR.fewest)


def check_counts(subject: Subject) -> None:
    """As many pictures or frames enter as the budget says; of a picture, no more tokens, in whole tokens."""
    for keep in (4, 9, 0.25, "50%", "100%") if subject.has_keep else ():
        for step, view in _cases(subject, keep=keep):
            want = Budget(keep, rounding=subject.kind.rounding).of(view)
            if isinstance(view, PictureView) and not isinstance(keep, int):
                want = max(want, view.least)
            found, where = answer(step, view), f"{subject.kind.slug}, keep={keep} of {view.n_visual}"
            if isinstance(found, Recut):
                high, wide = found.size or _part(found, view)
                whole = not high % PROCESSOR.side and not wide % PROCESSOR.side
                expect(whole and min(high, wide) > 0, f"{where}: {found.size} are no whole tokens")
                tokens = high * wide // PROCESSOR.side**2
                expect(tokens <= want, f"{where}: {tokens} tokens, promised {want}")
            elif isinstance(found, Reduce):
                expect(found.reduction.m == want, f"{where}: {found.reduction.m} enter, promised {want}")
            else:
                expect(want == view.n_visual, f"{where}: nothing changed, promised {want}")


def check_form(subject: Subject) -> None:
    """What is asked for can be had: a selection in order of at least one, or a box and a size of the picture."""
    for step, view in _cases(subject):
        found, where = answer(step, view), f"{subject.kind.slug} at {step.at}"
        if isinstance(found, Reduce):
            chosen = found.reduction.index
            expect(found.reduction.is_selection and found.reduction.ordered, f"{where}: no selection in order")
            ids = [] if chosen is None else chosen.flatten().tolist()
            proper = bool(ids) and ids == sorted(set(ids)) and ids[0] >= 0 and ids[-1] < view.n_visual
            expect(proper, f"{where}: {ids} of {view.n_visual}")
        elif isinstance(found, Recut):
            high, wide = view.size  # type: ignore[union-attr]
            left, top, right, bottom = found.box or (0, 0, wide, high)
            expect(0 <= left < right <= wide and 0 <= top < bottom <= high, f"{where}: {found.box} of {wide} × {high}")
        else:
            expect(isinstance(found, Observe), f"{where}: {type(found).__name__} is not known there")


def check_pure(subject: Subject) -> None:
    """A step asks for the same twice, changes none of its inputs, and leaves the global generator alone."""
    for step, view in _cases(subject):
        before = [x.clone() for x in _tensors(view)]
        state = torch.random.get_rng_state()
        first, second = answer(step, view), answer(step, view)
        expect(_said(first) == _said(second), f"{subject.kind.slug}: two runs differ")
        same = torch.equal(state, torch.random.get_rng_state())
        expect(same, f"{subject.kind.slug} used the global random generator")
        changed = [not torch.equal(x, y) for x, y in zip(_tensors(view), before, strict=True)]
        expect(not any(changed), f"{subject.kind.slug} changed its inputs")


def check_broken(subject: Subject) -> None:
    """A picture or frame whose features are NaN is not chosen while others remain."""
    for step, view in _cases(subject, **({"keep": 2} if subject.has_keep else {})):
        if isinstance(view, PictureView) or view.features is None or view.n_visual < 7:
            continue
        spoilt = replace(view, features=view.features.index_fill(1, torch.tensor([1, 3]), torch.nan))
        found = answer(step, spoilt)
        if isinstance(found, Reduce) and _said(found) != _said(answer(step, view)):
            chosen = found.reduction.representatives.flatten().tolist()
            expect(not {1, 3} & set(chosen), f"{subject.kind.slug}: {chosen} were chosen, of which 1 and 3 are NaN")


def check_identity(subject: Subject) -> None:
    """At its identity settings everything enters as it is."""
    if subject.kind.identity is None:
        return
    for step, view in _cases(subject, **subject.kind.identity):
        found = answer(step, view)
        same = isinstance(found, Observe)
        if isinstance(found, Reduce):
            same = found.reduction.representatives.flatten().tolist() == list(range(view.n_visual))
        expect(same, f"{subject.kind.slug} at {subject.kind.identity}: {found}")


INPUT_CHECKS: tuple[Callable[[Subject], None], ...] = (
    check_counts,
    check_form,
    check_pure,
    check_broken,
    check_identity,
)


def _cases(subject: Subject, **settings: Any) -> Iterator[tuple[Step, View]]:
    for act in subject.acts(**settings):
        for view in views(act.step.at.name):
            yield act.step, replace(view, module=act.module)


def _part(found: Recut, view: Any) -> tuple[int, int]:
    high, wide = view.size
    left, top, right, bottom = found.box or (0, 0, wide, high)
    return bottom - top, right - left


def _tensors(view: View) -> list[Tensor]:
    values = (getattr(view, own.name) for own in fields(view))
    return [value for value in values if isinstance(value, Tensor)]


def _said(found: Any) -> Any:
    """What can be compared of an action."""
    return found.reduction.representatives.tolist() if isinstance(found, Reduce) else found
