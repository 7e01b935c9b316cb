"""Claims of methods with trained parts, which are those for the reference model."""

from __future__ import annotations

from collections.abc import Iterator

from tests.methods.directional import Sample, at_random, blind_cuts

from .finding import Finding, as_many, compared, left, right


def dyvte(s: Sample, rolled: Sample) -> Iterator[Finding]:
    seen, whole = s.seen("dyvte").mean(), s.layout.n_content
    layer = round(s.handle.info.depth * seen / whole)
    what = f"no tokens at last, {seen:.0f} in the mean over layers"
    plans = {"routers": "dyvte", f"layer {layer} for all": f"dyvte:exit={layer}"}
    yield right(s, "dyvte", "routers answer more than one exit for all, at the mean depth", what, plans)
    plans = {"routers": "dyvte", "random": blind_cuts(at_random, (0,), (round(seen),))}
    yield right(s, "dyvte", "late exit answers more than as many random tokens in all layers", what, plans)


def explainability(s: Sample, rolled: Sample) -> Iterator[Finding]:
    slug, what = "explainability-compression", "32 tokens"
    own = f"{slug}:keep=32"
    kept = s.answers(own)[1]
    names = ("the net", "random")
    claim = "a net on the first layer's attention finds the evidence"
    yield compared(slug, claim, f"{what}, evidence left", names, s.recall(kept), s.recall(as_many(s, kept)))
    plans = {"the net": own, "random": blind_cuts(at_random, (0,), (32,))}
    yield right(s, slug, "it answers more than random tokens", what, plans)
    plans = {"the net": own, "[CLS] attention": "fastervlm:keep=32"}
    yield left(s, slug, "it leaves more evidence than the encoder's attention", what, plans)
    yield right(s, slug, "it answers more than the encoder's attention", what, plans)


def covipal(s: Sample, rolled: Sample) -> Iterator[Finding]:
    own, what = "covipal:ratios=[32,32]", "32 tokens"
    plans = {"the scorer": own, "random": blind_cuts(at_random, (0,), (32,))}
    yield left(s, "covipal", "a trained scorer leaves more evidence than chance", what, plans)
    yield right(s, "covipal", "it answers more than random tokens", what, plans)
    plans = {"the scorer": own, "[CLS] attention": "fastervlm:keep=32"}
    yield right(s, "covipal", "it answers more than training-free pruning", what, plans)


CLAIMS = {"covipal": covipal, "dyvte": dyvte, "explainability-compression": explainability}
