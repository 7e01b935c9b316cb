"""The claims of the first eight methods, each measured on the shipped model and on a second one."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from tests.methods.directional import (
    Sample,
    at_random,
    blind_cuts,
    by_lm,
    evenly,
    gap,
    lost,
    lower_less_upper,
    over,
    radius,
    spread,
)
from winnow.core.budget import Budget
from winnow.core.reduction import Reduction
from winnow.core.view import View
from winnow.methods.divprune import DivPrune
from winnow.methods.fastervlm import FasterVLM
from winnow.methods.fastv import FastV
from winnow.methods.hiprune import HiPrune
from winnow.methods.pyramiddrop import PyramidDrop
from winnow.methods.todre import ToDRE
from winnow.methods.visionzip import VisionZip
from winnow.methods.vtc_cls import VtcCls
from winnow.signals.language import LMAttention
from winnow.signals.vision import VisionAttention

from .finding import Finding, compared

TWINNED = ("fastervlm", "vtc-cls", "hiprune", "fastv", "pyramiddrop", "divprune", "todre", "visionzip")


def fastervlm(view: View, k: int) -> Reduction:
    return FasterVLM(keep=k).reduce(view)


def of_cls(s: Sample, rolled: Sample) -> Iterator[Finding]:
    for k in (32, 13):
        kept, other, late = s.kept(fastervlm, k), s.kept(at_random, k), by_lm(s, 2, k)
        what, claim = f"{k} tokens, evidence recall", "[CLS] finds the evidence better than random"
        yield compared("fastervlm", claim, what, ("[CLS]", "random"), s.recall(kept), s.recall(other))
        claim = "[CLS] finds the evidence better than FastV's signal (K = 2)"
        yield compared("fastervlm", claim, what, ("[CLS]", "FastV"), s.recall(kept), s.recall(late))
    for name, pair in {
        "fastervlm": (s.kept(fastervlm, 64), rolled.kept(fastervlm, 64)),
        "fastv, K = 2": (by_lm(s, 2, 64), by_lm(rolled, 2, 64)),
        "fastv, K = 3": (by_lm(s, 3, 64), by_lm(rolled, 3, 64)),
    }.items():
        claim = "things lower in the picture are kept better" + (" (the paper: no bias)" if name == "fastervlm" else "")
        shown = "64 tokens, recall of the same thing below less above the middle"
        yield Finding(name, claim, lower_less_upper(s, rolled, *pair), shown)
    for k in (64, 32):
        several = s.recall_of_things(s.kept(lambda v, k: VtcCls(keep=k, layers=(3, 4)).reduce(v), k))
        last = s.recall_of_things(s.kept(fastervlm, k))
        claim, what = "several blocks keep more of each thing than the feature block", f"{k} tokens, recall of things"
        yield compared("vtc-cls", claim, what, ("blocks 3–4", "block 4"), several, last)


def of_received(s: Sample) -> Iterator[Finding]:
    overlap = [s.overlap(s.signal(VisionAttention(block, query="all"))) for block in range(6)]
    claim, what = "received attention lies on objects in a middle block more than in", "IoU of things and the top 10 %"
    for middle, last, called in ((1, 5, "the last"), (1, 4, "the feature block"), (3, 4, "the feature block")):
        names = (f"block {middle}", f"block {last}")
        yield compared("hiprune", f"{claim} {called}", what, names, overlap[middle], overlap[last])
    for block in (1, 3):
        with_, without = (
            s.recall(s.kept(lambda v, k, a=a: HiPrune(keep=k, alpha=a, object_layer=block).reduce(v), 32))  # noqa: B023
            for a in (0.1, 0.0)
        )
        claim, what = f"anchors of block {block} keep more evidence than none", "32 tokens, evidence recall"
        yield compared("hiprune", claim, what, ("α = 0.1", "α = 0"), with_, without)


def of_the_lm(s: Sample) -> Iterator[Finding]:
    mass = [s.signal(LMAttention(k), f"layers[{k + 1}]").sum(1).double().numpy() for k in range(7)]
    each = ", ".join(f"{x.mean():.2f}" for x in mass)
    claim = "image tokens get little attention after the first two layers"
    shown = f"share of the last prompt token's attention in layers 0 to 6: {each}"
    yield Finding("fastv", claim, gap(np.mean(mass[:2], 0), np.mean(mass[2:], 0)), shown)
    full = s.right("full")
    for layer, k in ((1, 13), (2, 128), (2, 13), (3, 13), (4, 13)):
        cut, blind = s.right(FastV(keep=k, layer=layer)), s.right(blind_cuts(at_random, [layer], [k]))
        what, claim = f"{k} tokens from layer {layer} on, right", "its selection answers better than a random one"
        yield compared("fastv", claim, what, ("FastV", f"full {full.mean():.3f}, random"), cut, blind)
        if layer == 3:
            even, claim = s.right(blind_cuts(evenly, [layer], [k])), "its selection answers better than an even grid"
            yield compared("fastv", claim, what, ("FastV", "even grid"), cut, even)
    for cuts, even in (((128, 64, 32), 75), ((64, 16, 4), 28)):
        pyramid = s.right(PyramidDrop(ratios=tuple(map(Budget, cuts))))
        blind = s.right(blind_cuts(at_random, (2, 4, 6), cuts))
        claim, what = f"cuts to {cuts} answer better than", "right"
        fastv = s.right(FastV(keep=even, layer=2))
        yield compared(
            "pyramiddrop", f"{claim} FastV with as many tokens", what, ("PyramidDrop", "FastV"), pyramid, fastv
        )
        yield compared("pyramiddrop", f"{claim} random cuts", what, ("PyramidDrop", "random"), pyramid, blind)


def of_diversity(s: Sample) -> Iterator[Finding]:
    views, tower = s.views["projected"], s.views["features"]
    selections = {
        "DivPrune": lambda v: DivPrune(keep=13).reduce(v),
        "max": lambda v: ToDRE(keep=13, criterion="max").reduce(v),
        "sum": lambda v: ToDRE(keep=13).reduce(v),
        "[CLS]": lambda v: fastervlm(v, 13),
        "uniform": lambda v: evenly(v, 13),
    }
    apart = {name: over(views, lambda v, f=f: spread(v, f(v))) for name, f in selections.items()}
    far = {name: over(views, lambda v, f=f: radius(v, f(v))) for name, f in selections.items()}
    what = "13 tokens, smallest distance of two"
    for method, a, b in (("divprune", "DivPrune", "uniform"), ("todre", "max", "sum"), ("todre", "sum", "[CLS]")):
        yield compared(method, f"{a} lies farther apart than {b}", what, (a, b), apart[a], apart[b])
    what = "13 tokens, largest distance of a token to those kept"
    yield compared(
        "divprune", "nothing is far from what is kept", what, ("uniform", "DivPrune"), far["uniform"], far["DivPrune"]
    )
    zipped = over(tower, lambda v: lost(v, VisionZip(keep=64).reduce(v)))
    for name, select in (("FasterVLM", fastervlm), ("random", at_random)):
        chosen = [Reduction.select(select(view, 64).index + 1, view.n + 1) for view in views]
        other = np.concatenate([lost(v, found) for v, found in zip(tower, chosen, strict=True)])
        what, claim = (
            "64 tokens, distance of a dropped patch to the nearest output",
            "dropped patches are nearer than with",
        )
        yield compared("visionzip", f"{claim} {name}", what, (name, "VisionZip"), other, zipped)


def twinned(sample: Sample, rolled: Sample) -> Iterator[Finding]:
    yield from of_cls(sample, rolled)
    yield from of_received(sample)
    yield from of_the_lm(sample)
    yield from of_diversity(sample)
