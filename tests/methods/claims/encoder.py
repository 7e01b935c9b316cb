"""Claims of methods that choose by what the vision encoder has computed, before the language model."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import torch
from torch.nn.functional import normalize

from tests.methods.directional import PerScene, Sample, Selector, mask_of, over, spread
from tests.methods.directional import _nearest as nearest
from winnow.core.budget import Budget
from winnow.core.view import View
from winnow.methods.fastervlm import FasterVLM
from winnow.methods.fopru import FoPru
from winnow.methods.holov import HoloV
from winnow.methods.vflowopt import VFlowOpt
from winnow.methods.vispruner import VisPruner
from winnow.methods.vscan import VScan
from winnow.signals.vision import VisionAttention

from .finding import Finding, as_many, compared, gaps, left, nearer, right, touched

CLS = FasterVLM(keep=32)
READING = ("reading", "document")


def patches(s: Sample) -> Iterator[View]:
    """All patches as the tower gives them, with [CLS] attention."""
    for tower, projected in zip(s.views["features"], s.views["projected"], strict=True):
        yield View.of(tower.tokens[:, 1:], projected[VisionAttention(query="auto")], layout=projected.layout)


def alike(view: View, select: Selector, k: int) -> PerScene:
    """The mean cosine of two kept tokens."""
    x = normalize(select(view, k).apply(view.tokens).float(), dim=-1)
    return (x @ x.mT).mean((1, 2)).double().numpy()


def vispruner(s: Sample, rolled: Sample) -> Iterator[Finding]:
    views, names = list(patches(s)), ("VisPruner", "[CLS] alone")
    for k in (32, 13):
        selections = (lambda v, k: VisPruner(keep=k).reduce(v), lambda v, k: FasterVLM(keep=k).reduce(v))
        close = [over(views, lambda v, f=f: alike(v, f, k)) for f in selections]  # noqa: B023
        claim, what = "fewer near-duplicates are kept than by [CLS] alone", f"{k} tokens, mean cosine of two"
        yield nearer("vispruner", claim, what, names, *close)
        hit = [touched(s, torch.cat([f(view, k).kept for view in views])) for f in selections]
        yield compared("vispruner", "more things are hit", f"{k} tokens, share of things", names, *hit)
        plans = {"VisPruner": VisPruner(keep=k), "[CLS] alone": FasterVLM(keep=k)}
        yield right(s, "vispruner", "more questions are answered than by [CLS] alone", f"{k} tokens", plans)


def holov(s: Sample, rolled: Sample) -> Iterator[Finding]:
    names, views = ("HoloV", "[CLS] alone"), s.views["projected"]
    selections = (lambda v, k: HoloV(keep=k).reduce(v), lambda v, k: FasterVLM(keep=k).reduce(v))
    for k in (64, 13):
        claim, what = "kept tokens are spread wider than by [CLS] alone", "distance of a patch to the nearest kept"
        wide = [gaps(s, s.kept(select, k)) for select in selections]
        yield nearer("holov", claim, f"{k} tokens, {what}", names, *wide)
        claim, what = "kept tokens are less alike than by [CLS] alone", "mean cosine of two"
        close = [over(views, lambda v, f=f: alike(v, f, k)) for f in selections]  # noqa: B023
        yield nearer("holov", claim, f"{k} tokens, {what}", names, *close)
        claim, what = "no two kept tokens are as alike as two by [CLS] alone", "smallest distance of two"
        least = [over(views, lambda v, f=f: spread(v, f(v, k))) for f in selections]  # noqa: B023
        yield compared("holov", claim, f"{k} tokens, {what}", names, *least)
    kept = [s.answers(plan)[1] for plan in (HoloV(keep=32), CLS)]
    hit = [touched(s, k) for k in kept]
    yield compared("holov", "more things are hit than by [CLS] alone", "32 tokens, share of things", names, *hit)
    plans = dict(zip(names, (HoloV(keep=32), CLS), strict=True))
    yield right(s, "holov", "more questions are answered than by [CLS] alone", "32 tokens", plans)
    plans = {"holistic": HoloV(keep=32), "attention": HoloV(keep=32, by="attention")}
    yield right(s, "holov", "ranking by attention and diversity answers more than by attention", "32 tokens", plans)


def fopru(s: Sample, rolled: Sample) -> Iterator[Finding]:
    plans = {"row": FoPru(keep=32, strategy="row"), "rank": FoPru(keep=32)}
    yield left(s, "fopru", "whole rows hold more of the evidence than single tokens", "32 tokens", plans)
    yield right(s, "fopru", "whole rows answer more than single tokens", "32 tokens", plans)
    own = np.array([r.ask.type in READING for r in s.requests])
    first, second = (s.right(plan)[own] for plan in plans.values())
    claim, what = "whole rows answer more of what has to be read", f"32 tokens, {own.sum()} questions, right"
    yield compared("fopru", claim, what, ("row", "rank"), first, second)
    kept = s.answers(plans["rank"])[1]
    claim, what = "received attention finds evidence", "32 tokens, evidence left"
    yield compared("fopru", claim, what, ("FoPru", "random"), s.recall(kept), s.recall(as_many(s, kept)))


def vscan(s: Sample, rolled: Sample) -> Iterator[Finding]:
    method = VScan(keep=32, last=Budget("100%"), query="cls")
    bound = method.bind(s.handle.info)[0]
    views = s.views["projected"]

    def lost(view: View, found) -> PerScene:
        dropped = ~mask_of(found.representatives, view.n)
        error = (1 - nearest(view.tokens, found.apply(view.tokens))) * dropped
        return (error.sum(1) / dropped.sum(1)).double().numpy()

    far = [over(views, lambda v, m=m: lost(v, m.reduce(v))) for m in (bound, CLS)]
    claim, what = "dropped tokens lie nearer to what is left than by [CLS] alone", "32 tokens, distance"
    yield nearer("vscan", claim, what, ("VScan", "[CLS] alone"), *far)
    plans = {"global and local": method, "global alone": method.replace(local=0.0)}
    yield left(s, "vscan", "local tokens add evidence to global ones", "32 tokens", plans)
    yield right(s, "vscan", "local tokens add answers to global ones", "32 tokens", plans)
    yield right(s, "vscan", "more is answered than by [CLS] alone", "32 tokens", {"VScan": method, "[CLS] alone": CLS})
    plans = {"48, then 16": method.replace(keep=48, last=Budget(16)), "32": method}
    claim = "a second cut inside the LM answers more than cutting at once"
    yield right(s, "vscan", claim, "32 tokens in the mean over layers", plans)


def vflowopt(s: Sample, rolled: Sample) -> Iterator[Finding]:
    for threshold, called in ((None, "at the released threshold"), (2.0, "at a threshold of this tower (2)")):
        method = VFlowOpt(before=0.25, middle=1, late=1, threshold=threshold)
        kept = s.answers(method)[1]
        claim, what = f"its score finds evidence, {called}", "64 tokens, evidence left"
        yield compared("vflowopt", claim, what, ("VFlowOpt", "random"), s.recall(kept), s.recall(as_many(s, kept)))


CLAIMS = {"vispruner": vispruner, "holov": holov, "fopru": fopru, "vscan": vscan, "vflowopt": vflowopt}
