"""Claims of methods that compare tokens with the question, before the language model."""

from __future__ import annotations

from collections.abc import Iterator

from tests.methods.directional import Sample
from winnow.methods.cdpruner import CDPruner
from winnow.methods.divprune import DivPrune
from winnow.methods.mmtok import MMTok
from winnow.methods.recoverable_compression import RecoverableCompression

from .finding import Finding, compared, left, right, touched


def cdpruner(s: Sample, rolled: Sample) -> Iterator[Finding]:
    relevant, diverse = CDPruner(keep=32), CDPruner(keep=32, theta=0.0)
    plans = {"relevance": relevant, "none": diverse}
    yield left(s, "cdpruner", "relevance finds evidence that diversity alone does not", "32 tokens", plans)
    plans = {"none": diverse, "sign turned": CDPruner(keep=32, sign="minus")}
    yield left(
        s, "cdpruner", "similar tokens are the relevant ones: with its sign turned, evidence goes", "32 tokens", plans
    )
    for k in (32, 13):
        plans = {"CDPruner": CDPruner(keep=k), "DivPrune": DivPrune(keep=k)}
        yield right(s, "cdpruner", "more is answered than by DivPrune", f"{k} tokens", plans)


def mmtok(s: Sample, rolled: Sample) -> Iterator[Finding]:
    both = MMTok(keep=4)
    words, picture = both.replace(alpha=0.0), both.replace(alpha=1e6)
    for other, called in ((picture, "the picture"), (words, "the words")):
        plans = {"both": both, called: other}
        yield left(s, "mmtok", f"covering both finds more evidence than {called} alone", "4 tokens", plans)
        yield right(s, "mmtok", f"covering both answers more than {called} alone", "4 tokens", plans)
    hit = [touched(s, s.answers(plan.replace(keep=13))[1]) for plan in (both, words)]
    claim, what = "covering both touches more things than the words alone", "13 tokens, share of things"
    yield compared("mmtok", claim, what, ("both", "the words"), *hit)


def recoverable(s: Sample, rolled: Sample) -> Iterator[Finding]:
    for k in (32, 13):
        own = RecoverableCompression(keep=k)
        plans = {"recovery": own, "none": own.replace(recover=False)}
        claim = "recovery finds evidence that the encoder's attention has missed"
        yield left(s, "recoverable-compression", claim, f"{k} tokens in all", plans)
        yield right(s, "recoverable-compression", "recovery answers more than none", f"{k} tokens in all", plans)


CLAIMS = {"cdpruner": cdpruner, "mmtok": mmtok, "recoverable-compression": recoverable}
