"""Claims of methods that act inside the vision tower, or on its output with [CLS]."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from tests.methods.directional import Sample
from tests.methods.tower_merges import Dropped
from winnow.core.budget import Budget
from winnow.methods.auroracap import AuroraCap
from winnow.methods.diffrate import DiffRate
from winnow.methods.fastervlm import FasterVLM
from winnow.methods.flowcut import FlowCut
from winnow.methods.pixelprune import PixelPrune
from winnow.methods.prumerge import PruMerge
from winnow.methods.token_transforming import TokenTransforming
from winnow.methods.tome import ToMe

from .finding import Finding, as_many, compared, gaps, left, nearer, right


def diffrate(s: Sample, rolled: Sample) -> Iterator[Finding]:
    method = DiffRate().at_budget(32, 256)
    plans = {
        "merging": DiffRate(prune=(Budget("100%"),), merge=(Budget(32),)),
        "pruning": DiffRate(prune=(Budget(32),), merge=(Budget(32),)),
    }
    yield right(s, "diffrate", "merging answers more than pruning, all at the first block", "32 tokens", plans)
    plans = {"all blocks": method, "the first block": plans["merging"]}
    yield right(s, "diffrate", "a schedule over all blocks answers more than one block", "32 tokens", plans)


def tome(s: Sample, rolled: Sample) -> Iterator[Finding]:
    what, merged = "56 tokens left by five blocks", ToMe(40)
    plans = {"ToMe": merged, "random": Dropped(40)}
    yield right(s, "tome", "merging answers more than dropping as many at random", what, plans)
    plans = {"on": merged, "off": merged.replace(proportional=False)}
    yield right(s, "tome", "proportional attention answers more than plain attention", what, plans)


def auroracap(s: Sample, rolled: Sample) -> Iterator[Finding]:
    plans = {"AuroraCap": AuroraCap(0.06), "random": Dropped(40)}
    what = "a ratio of 0.06: 56 tokens left by five blocks"
    yield right(s, "auroracap", "merging answers more than dropping as many at random", what, plans)


def token_transforming(s: Sample, rolled: Sample) -> Iterator[Finding]:
    transform, merge, prune = (
        TokenTransforming(form=form).at_budget(32, 256) for form in ("transform", "merge", "prune")
    )
    claim, plans = "many to many answers more than merging", {"many to many": transform, "merging": merge}
    yield right(s, "token-transforming", claim, "32 tokens", plans)
    claim, plans = "many to many answers more than pruning", {"many to many": transform, "pruning": prune}
    yield right(s, "token-transforming", claim, "32 tokens", plans)
    claim, plans = "merging answers more than pruning", {"merging": merge, "pruning": prune}
    yield right(s, "token-transforming", claim, "32 tokens", plans)


def flowcut(s: Sample, rolled: Sample) -> Iterator[Finding]:
    plans = {"FlowCut": FlowCut(keep=32), "[CLS] of one block": FasterVLM(keep=32)}
    yield left(s, "flowcut", "flow to [CLS] finds more evidence than its attention in one block", "32 tokens", plans)
    yield right(s, "flowcut", "flow to [CLS] answers more than its attention in one block", "32 tokens", plans)


def prumerge(s: Sample, rolled: Sample) -> Iterator[Finding]:
    outliers, plus = PruMerge(keep=33), PruMerge(keep=33, plus=True)
    names, both = ("plus", "outliers"), {"plus": plus, "outliers": outliers}
    what = "33 tokens, distance of a patch to the nearest that is kept"
    far = [gaps(s, s.answers(plan)[1]) for plan in (plus, outliers)]
    yield nearer("prumerge", "plus spreads over the picture", what, names, *far)
    yield right(s, "prumerge", "plus answers more than outliers alone", "33 tokens", both)
    plans = {"merging": outliers, "none": outliers.replace(neighbours=0)}
    yield right(s, "prumerge", "merging neighbours into outliers answers more than dropping them", "33 tokens", plans)
    kept = s.answers(outliers)[1]
    claim, what = "outliers of [CLS] attention hold evidence", "33 tokens, evidence left"
    yield compared("prumerge", claim, what, ("PruMerge", "random"), s.recall(kept), s.recall(as_many(s, kept)))


def pixelprune(s: Sample, rolled: Sample) -> Iterator[Finding]:
    for threshold in (0.0, 0.2):
        method = PixelPrune(threshold=threshold, std=0.27)
        kept = s.answers(method)[1]
        share = kept.double().mean(1).numpy()
        claim, what = "at most 71 % of patches are left (the paper: 22–71 % on documents)", f"threshold {threshold:g}"
        yield nearer("pixelprune", claim, f"{what}, share", ("left", "the bound"), share, np.full_like(share, 0.71))
        if share.mean() < 1:
            claim, names = "what pixels do not explain holds the evidence", ("PixelPrune", "as many at random")
            blind = s.recall(as_many(s, kept))
            yield compared("pixelprune", claim, f"{what}, evidence left", names, s.recall(kept), blind)


CLAIMS = {
    "diffrate": diffrate,
    "auroracap": auroracap,
    "tome": tome,
    "token-transforming": token_transforming,
    "flowcut": flowcut,
    "prumerge": prumerge,
    "pixelprune": pixelprune,
}
