"""What every method of the cache must hold, with no model at hand."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from winnow.cache.rotary import Rotary
from winnow.core.kv import Codec, KVStep, KVView
from winnow.core.kv_budget import KVBudget
from winnow.core.step import KVReduce, Observe
from winnow.testing.largest import Largest
from winnow.testing.subject import Subject, answer, expect

B, G, GROUP, D = 2, 2, 2, 16
ROTARY = Rotary(10000.0 ** (-torch.arange(0, D, 2) / D))
Case = tuple[KVStep, KVView]


def view_of(layer: int, n: int, *, b: int = B, seed: int = 0, depth: int = 3) -> KVView:
    """A prompt of n random tokens that was read just now."""
    generator = torch.Generator().manual_seed(seed)
    keys, values = (torch.randn(b, G, n, D, generator=generator) for _ in range(2))
    queries = torch.randn(b, G * GROUP, n, D, generator=generator)
    below = tuple(torch.randn(b, G, n, D, generator=generator) for _ in range(2))
    return KVView.of(keys, values, queries, layer=layer, depth=depth, below=below if layer else None, rotary=ROTARY)


def check_counts(subject: Subject) -> None:
    """Every head keeps what the budget says, summed over heads and averaged over layers; slots stay in order."""
    if not subject.has_keep:
        return
    for n in (24, 80):
        for keep in (8, n // 2, n + 5, "25%", "100%"):
            held, least = [], 0
            for step, view in _cases(subject, n, keep=keep):
                least = max(least, min(n, sum(subject.method(keep=keep).ends(view))))  # type: ignore[attr-defined]
                action = answer(step, view)
                if isinstance(action, KVReduce):
                    _check_form(action, view, f"{subject.kind.slug}, keep={keep}, {n} slots")
                    sizes = action.k.counts or (action.k.m,) * (view.b * view.heads)
                    held.append(sum(sizes) / len(sizes))
                else:
                    held.append(float(view.n))
            want = max(least, KVBudget(keep).of(n, n, layer=0, depth=1))
            mean = sum(held) / len(held)
            expect(
                abs(mean - want) <= max(1, 0.02 * want),
                f"{subject.kind.slug}: keep={keep} of {n} slots promises {want} a head, and {mean:g} are held",
            )


def check_broken(subject: Subject) -> None:
    """Keys that are NaN do not crash a step, and are not preferred."""
    bad = torch.tensor([3, 7])
    for step, view in _cases(subject, 64, **({"keep": 16} if subject.has_keep else {})):
        keys = view.keys.index_fill(2, bad, torch.nan)
        action = answer(step, replace(view, keys=keys))
        if isinstance(action, KVReduce):
            _check_form(action, view, f"{subject.kind.slug} with NaN")


def check_flat(subject: Subject) -> None:
    """Equal keys, values and queries give a proper map, the same twice and for every sample."""
    for step, view in _cases(subject, 48, **({"keep": 12} if subject.has_keep else {})):
        flat: dict[str, Any] = {name: torch.ones_like(getattr(view, name)) for name in ("keys", "values", "queries")}
        ones = replace(view, **flat)
        first, second = answer(step, ones), answer(step, ones)
        if isinstance(first, KVReduce):
            _check_form(first, view, f"{subject.kind.slug} with equal keys")
            kept = first.k.representatives
            expect(torch.equal(kept, second.k.representatives), f"{subject.kind.slug}: two runs differ")
            expect(torch.equal(kept[0], kept[1]), f"{subject.kind.slug}: two equal samples differ")


def check_pure(subject: Subject) -> None:
    """A step changes none of its inputs, and leaves the global generator alone."""
    for step, view in _cases(subject, 48, **({"keep": 12} if subject.has_keep else {})):
        before = [x.clone() for x in (view.keys, view.values, view.queries)]
        state = torch.random.get_rng_state()
        answer(step, view)
        expect(torch.equal(state, torch.random.get_rng_state()), f"{subject.kind.slug} used the global generator")
        for x, y in zip(before, (view.keys, view.values, view.queries), strict=True):
            expect(torch.equal(x, y), f"{subject.kind.slug} changed its inputs")


def check_batch(subject: Subject) -> None:
    """A batch gives exactly what its samples give alone."""
    for step, view in _cases(subject, 48, b=3, **({"keep": 12} if subject.has_keep else {})):
        whole = answer(step, view)
        for row in range(view.b):
            alone = answer(step, _row(view, row))
            where = f"{subject.kind.slug}: sample {row} of a batch and alone"
            expect(type(whole) is type(alone), where)
            if isinstance(whole, KVReduce) and isinstance(alone, KVReduce):
                for a, b in ((whole.k, alone.k), (whole.v, alone.v)):
                    expect(torch.equal(a.lane(row).to_matrix(), b.lane(0).to_matrix()), where)
            elif isinstance(whole, Codec) and isinstance(alone, Codec):
                for x, y in zip(_read_back(whole, view), _read_back(alone, _row(view, row)), strict=True):
                    expect(torch.allclose(x[row], y[0], atol=1e-5), where)


def check_identity(subject: Subject) -> None:
    """At its identity settings it leaves the cache as it is."""
    if subject.kind.identity is None:
        return
    for step, view in _cases(subject, 48, **subject.kind.identity):
        action = answer(step, view)
        expect(isinstance(action, Observe), f"{subject.kind.slug} at {subject.kind.identity}: {type(action).__name__}")


def check_memory(subject: Subject) -> None:
    """Nothing of heads × N × N is made."""
    settings = {"keep": 32} if subject.has_keep else {}
    for step, view in _cases(subject, 48, **settings):
        layer = step.at.index or 0
        views = (replace(view_of(layer, n, b=1, depth=layer + 1), module=view.module) for n in (400, 800))
        small, large = (_largest(step, own) for own in views)
        expect(
            large < 3 * max(small, 1) or small < 400 * 400,
            f"{subject.kind.slug}: {small} elements for 400 slots, {large} for twice as many",
        )


def _largest(step: KVStep, view: KVView) -> int:
    """Elements of the largest tensor that a step makes."""
    with Largest() as seen:
        answer(step, view)
    return seen.elements


CACHE_CHECKS: tuple[Callable[[Subject], None], ...] = (
    check_counts,
    check_broken,
    check_flat,
    check_pure,
    check_batch,
    check_identity,
    check_memory,
)


def _cases(subject: Subject, n: int, *, b: int = B, **settings: Any) -> Iterator[Case]:
    """The steps that run in a prefill, each with a view of its layer."""
    acts = [act for act in subject.acts(**settings) if isinstance(act.step, KVStep)]
    depth = 1 + max((act.step.at.index or 0 for act in acts), default=0)
    for act in acts:
        step = act.step
        if isinstance(step, KVStep) and "prefill" in step.when:
            yield step, replace(view_of(step.at.index or 0, n, b=b, depth=depth), module=act.module)


def _read_back(codec: Codec, view: KVView) -> list[Tensor]:
    """Keys and values as a codec gives them back; those of the layer before as well, where it takes both."""
    if not codec.pair:
        return [*codec.encode(view.keys, view.values).read()]
    blocks = codec.encode(*(view.below or ()), view.keys, view.values)
    return [x for block in blocks for x in block.read()]


def _row(view: KVView, row: int) -> KVView:
    def one(x: Tensor | None) -> Tensor | None:
        return None if x is None else x[row : row + 1]

    below: Any = None if view.below is None else tuple(one(x) for x in view.below)
    cut: dict[str, Any] = {name: one(getattr(view, name)) for name in ("keys", "values", "queries", "slots")}
    return replace(view, **cut, below=below, slot_bytes=view.slot_bytes // view.b)


def _check_form(action: KVReduce, view: KVView, where: str) -> None:
    lanes = (view.b, view.heads)
    for chosen in (action.k, action.v):
        expect(chosen.n == view.n and tuple(chosen.lanes) == lanes, f"{where}: n {chosen.n}, lanes {chosen.lanes}")
    expect((action.k.m, action.k.counts) == (action.v.m, action.v.counts), f"{where}: keys and values differ in number")
    sizes = action.k.counts or (action.k.m,) * (view.b * view.heads)
    for lane, kept in zip(sizes, action.k.representatives.flatten(0, 1).tolist(), strict=True):
        own = kept[:lane]
        expect(all(0 <= slot < view.n for slot in own), f"{where}: a slot is out of range: {own}")
        expect(own == sorted(set(own)), f"{where}: slots come twice or out of order: {own}")
