"""Measure on the reference model what papers claim of their methods, and write the table of what was found.

    python tools/findings.py [MODEL]          print the table
    python tools/findings.py write [MODEL]    docs/findings.md

MODEL is the folder of a second model: what holds on one training alone says little.
Numbers come from the sample of `tests/methods/directional.py`, which the directional tests use as well.
"""

from __future__ import annotations

import hashlib
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

os.environ.setdefault("OMP_NUM_THREADS", "1")
ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import numpy as np  # noqa: E402

from tests.methods.directional import (  # noqa: E402
    SCENES,
    Gap,
    Sample,
    at_random,
    blind_cuts,
    by_lm,
    evenly,
    gap,
    lost,
    lower_less_upper,
    opened,
    over,
    radius,
    spread,
)
from winnow import reference  # noqa: E402
from winnow.core.budget import Budget  # noqa: E402
from winnow.core.reduction import Reduction  # noqa: E402
from winnow.core.view import View  # noqa: E402
from winnow.learn.markdown import table  # noqa: E402
from winnow.methods.divprune import DivPrune  # noqa: E402
from winnow.methods.fastervlm import FasterVLM  # noqa: E402
from winnow.methods.fastv import FastV  # noqa: E402
from winnow.methods.hiprune import HiPrune  # noqa: E402
from winnow.methods.pyramiddrop import PyramidDrop  # noqa: E402
from winnow.methods.todre import ToDRE  # noqa: E402
from winnow.methods.visionzip import VisionZip  # noqa: E402
from winnow.methods.vtc_cls import VtcCls  # noqa: E402
from winnow.signals.language import LMAttention  # noqa: E402
from winnow.signals.vision import VisionAttention  # noqa: E402

TARGET = ROOT / "docs" / "findings.md"
HEAD = f"""# Findings

What papers say of their methods, measured on the shipped reference model: {SCENES} questions about details, one for
each scene of the test split, 256 visual tokens. Intervals are paired over scenes, at 95 %. A claim **holds** when the
interval of the difference lies on its side of zero, is **contradicted** when it lies on the other side, and is **open**
otherwise. The model is small and its world is drawn: what fails here says where not to take a claim for granted, not
that the paper is wrong about its own models. There are many rows, and their intervals are not corrected for that; which
settings became tests was decided on these same scenes.

`python tools/findings.py write` makes this page; claims that hold and that separate a method from blind selections are
tests (`tests/methods/test_directional_reference.py`).
"""
TWIN = """
The column *twin* is the same on the shipped model's twin, whose language model never missed a token in training and
whose tower is the same (see [the card](reference-model.md)). What is read off the tower alone differs by the projector
at most; where the two disagree on what happens inside the language model, the claim hangs on how a model was trained.
"""


class Finding(NamedTuple):
    method: str
    claim: str
    difference: Gap
    measured: str

    @property
    def verdict(self) -> str:
        return "holds" if self.difference.low > 0 else "contradicted" if self.difference.high < 0 else "open"

    def line(self, twin: Finding | None) -> list[str]:
        """A row of the table; with the verdict on another model if there is one."""
        there = [] if twin is None else [f"{twin.verdict}, {twin.difference}"]
        return [self.method, self.claim, self.verdict, *there, f"{self.measured}; difference {self.difference}"]


def fastervlm(view: View, k: int) -> Reduction:
    return FasterVLM(keep=k).reduce(view)


def compared(
    method: str, claim: str, what: str, names: tuple[str, str], first: np.ndarray, second: np.ndarray
) -> Finding:
    """The claim that `first` is the larger."""
    shown = f"{what}: {names[0]} {first.mean():.3f}, {names[1]} {second.mean():.3f}"
    return Finding(method, claim, gap(first, second), shown)


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


def findings(folder: str | None = None) -> list[Finding]:
    """All of them, on the shipped model or on that in `folder`."""
    with opened(folder) as (sample, rolled):
        return [*of_cls(sample, rolled), *of_received(sample), *of_the_lm(sample), *of_diversity(sample)]


def main(args: list[str]) -> int:
    folders = [arg for arg in args if arg != "write"]
    rows = findings()
    twins: list[Finding | None] = [*findings(folders[0])] if folders else [None] * len(rows)
    heads = ["method", "claim", "here", *(["twin"] if folders else []), "measured"]
    weights = hashlib.sha256((reference.path() / "model.safetensors").read_bytes()).hexdigest()[:12]
    lines = [row.line(twin) for row, twin in zip(rows, twins, strict=True)]
    page = HEAD + (TWIN if folders else "") + f"\n{table(heads, lines)}\n\nWeights: SHA-256 {weights}…\n"
    if "write" in args:
        TARGET.write_text(page, encoding="utf-8")
    else:
        print(page, end="")
    return 0


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
