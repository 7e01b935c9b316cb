"""Claims of methods that act inside the language model."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from tests.methods.directional import PerScene, Sample, at_random, blind_cuts, moved, over
from tests.methods.directional import _nearest as nearest
from tests.methods.test_sparsevlm import ByOtherWords
from winnow.core.budget import Budget
from winnow.core.method import Method
from winnow.core.view import View
from winnow.methods.aim import AIM
from winnow.methods.dart import DART
from winnow.methods.divprune import DivPrune
from winnow.methods.efficientvla import EfficientVLA
from winnow.methods.fastv import FastV
from winnow.methods.fitprune import FitPrune
from winnow.methods.mustdrop import MustDrop
from winnow.methods.pyramiddrop import PyramidDrop
from winnow.methods.sparsevlm import SparseVLM
from winnow.methods.transprune import TransPrune
from winnow.methods.v2drop import V2Drop
from winnow.methods.visiondrop import VisionDrop
from winnow.methods.vtw import VTW

from .finding import Finding, as_many, compared, left, nearer, right


def aim(s: Sample, rolled: Sample) -> Iterator[Finding]:
    late, early = (AIM(rounds=0, first=layer, last=layer) for layer in (6, 2))
    plans = {"from layer 6 on": late, "from layer 2 on": early}
    yield right(s, "aim", "deep layers need no vision: dropping all late costs less than early", "no tokens", plans)
    merged = AIM(rounds=3, left=Budget("100%"))

    def far(view: View, tokens) -> PerScene:
        return (1 - nearest(view.tokens, tokens)).mean(1).double().numpy()

    views = s.views["projected"]
    own = over(views, lambda v: far(v, merged.reduce(v).apply(v.tokens)))
    strided = over(views, lambda v: far(v, v.tokens[:, :: v.n // 32]))
    claim, what = "merged tokens represent the picture better than equal steps", "32 tokens, distance of a token"
    yield nearer("aim", claim, what, ("AIM", "equal steps"), own, strided)
    plans = {"AIM": merged, "random": blind_cuts(at_random, (0,), (32,))}
    yield right(s, "aim", "merged tokens answer more than random ones", "32 tokens", plans)


def dart(s: Sample, rolled: Sample) -> Iterator[Finding]:
    for k in (32, 13):
        plans = {"DART": DART(keep=k), "FastV": FastV(keep=k, layer=2)}
        claim, what = "few duplicates of pivots answer more than much attention", f"{k} tokens from layer 2 on"
        yield right(s, "dart", claim, what, plans)
        yield left(s, "dart", "it leaves more evidence than FastV", what, plans)
        plans = {"DART": DART(keep=k), "DivPrune": DivPrune(keep=k)}
        yield right(s, "dart", "more is answered than by DivPrune, before the LM", f"{k} tokens", plans)


def efficientvla(s: Sample, rolled: Sample) -> Iterator[Finding]:
    both = EfficientVLA(keep=32)
    for alpha, called in ((1.0, "relevance"), (0.0, "diversity")):
        plans = {"both": both, called: both.replace(alpha=alpha)}
        claim, what = f"relevance and diversity (α = 0.5) beat {called} alone", "32 tokens from layer 2 on"
        yield right(s, "efficientvla", claim, what, plans)
        yield left(s, "efficientvla", claim, what, plans)


def sparsevlm(s: Sample, rolled: Sample) -> Iterator[Finding]:
    own, what = SparseVLM().at_budget(32, 256), "32 tokens at last"
    plans = {"raters": own, "other words": ByOtherWords().at_budget(32, 256)}
    yield left(s, "sparsevlm", "words that are raters find more evidence than the others", what, plans)
    yield right(s, "sparsevlm", "words that are raters answer more than the others", what, plans)
    plans = {"recycling": own, "none": SparseVLM(recycle=0.0).at_budget(32, 256)}
    yield right(s, "sparsevlm", "recycling answers more than dropping", what, plans)


def cuts(s: Sample, method: Method) -> Method:
    """The same cuts by random choices."""
    bound = method.bind(s.handle.info)[0]
    return blind_cuts(at_random, bound.layers, [ratio.of(256) for ratio in bound.ratios])


def transprune(s: Sample, rolled: Sample) -> Iterator[Finding]:
    own, what = TransPrune().at_budget(32, 256), "32 tokens at last"
    for method, called in (
        (own, "movement and attention"),
        (own.replace(suffix=True), "both, by the template's words as well (as released)"),
        (own.replace(attention=False), "movement alone"),
    ):
        plans = {called.split(",")[0]: method, "random": cuts(s, own)}
        yield left(s, "transprune", f"{called} find more evidence than chance", what, plans)
        yield right(s, "transprune", f"{called} answer more than chance", what, plans)
    names = ("movement", "FastV")
    yield less_by_place(s, rolled, "transprune", names, own.replace(attention=False), FastV(keep=32, layer=2))


def v2drop(s: Sample, rolled: Sample) -> Iterator[Finding]:
    for layer in (1, 2, 3, 4):
        plans = {
            "V2Drop": V2Drop(ratios=(Budget(32),), layers=(layer,)),
            "random": blind_cuts(at_random, (layer,), (32,)),
        }
        claim, what = "tokens that a layer changes most are the evidence", f"one cut to 32 before layer {layer}"
        yield left(s, "v2drop", claim, what, plans)
    own = V2Drop().at_budget(32, 256)
    plans = {"V2Drop": own, "random": cuts(s, own)}
    yield right(s, "v2drop", "its schedule answers more than random cuts of the same sizes", "32 tokens at last", plans)


def visiondrop(s: Sample, rolled: Sample) -> Iterator[Finding]:
    own, other = VisionDrop().at_budget(32, 256), PyramidDrop().at_budget(32, 256)
    yield less_by_place(s, rolled, "visiondrop", ("VisionDrop", "PyramidDrop"), own, other)
    plans = {"VisionDrop": own, "PyramidDrop": other}
    yield right(s, "visiondrop", "visual attention answers more than the text's", "32 tokens at last", plans)


def fitprune(s: Sample, rolled: Sample) -> Iterator[Finding]:
    own, what = FitPrune().at_budget(32, 256), "32 tokens at last"
    done = own.recipe.cuts(s.handle.info.depth)
    left_over = [own.kept(256, layers, max(done.values())) for layers in done.values()]
    plans = {"FitPrune": own, "random": blind_cuts(at_random, tuple(done), left_over)}
    yield left(s, "fitprune", "what image and text attend to is the evidence", what, plans)
    yield right(s, "fitprune", "its schedule answers more than random cuts of the same sizes", what, plans)
    plans = {"FitPrune": own, "FastV": FastV(keep=32, layer=2)}
    yield left(s, "fitprune", "it leaves more evidence than FastV, which cuts at once", what, plans)
    yield right(s, "fitprune", "it answers more than FastV, which cuts at once", what, plans)


def vtw(s: Sample, rolled: Sample) -> Iterator[Finding]:
    plans = {f"from layer {layer} on": VTW(layer=layer) for layer in (6, 2)}
    yield right(s, "vtw", "deep layers need no vision: withdrawing late costs less than early", "no tokens", plans)
    for layer, where in ((4, "half"), (6, "three quarters")):
        seen = layer * 32
        plans = {"VTW": VTW(layer=layer), "random": blind_cuts(at_random, (0,), (seen,))}
        claim = f"withdrawal at {where} of the depth answers more than as many random tokens in all layers"
        yield right(s, "vtw", claim, f"no tokens at last, {seen} in the mean over layers", plans)


def mustdrop(s: Sample, rolled: Sample) -> Iterator[Finding]:
    own, what = MustDrop().at_budget(32, 256), "32 tokens at last"
    plans = {"key tokens": own, "none": own.replace(key=0.0)}
    yield left(s, "mustdrop", "tokens that [CLS] sees and nothing may drop save evidence", what, plans)
    yield right(s, "mustdrop", "tokens that [CLS] sees and nothing may drop save answers", what, plans)
    plans = {"merging": own, "none": own.replace(flat=2.0)}
    yield right(s, "mustdrop", "merging flat windows first answers more than not merging", what, plans)
    kept = s.answers(own)[1]
    claim, what = "what is left holds evidence", "32 tokens at last, evidence left"
    yield compared("mustdrop", claim, what, ("MustDrop", "random"), s.recall(kept), s.recall(as_many(s, kept)))


def less_by_place(
    s: Sample, rolled: Sample, method: str, names: tuple[str, str], own: Method, other: Method
) -> Finding:
    """The claim that what `own` leaves of a thing depends less on its place than what `other` leaves."""
    by = [np.abs(moved(s, rolled, s.answers(plan)[1], rolled.answers(plan)[1])) for plan in (own, other)]
    claim = f"what is kept depends less on the place of a thing than with {names[1]}"
    what = "32 tokens at last, difference of recall between halves of the picture"
    return nearer(method, claim, what, names, *by)


CLAIMS = {
    "aim": aim,
    "dart": dart,
    "efficientvla": efficientvla,
    "fitprune": fitprune,
    "sparsevlm": sparsevlm,
    "transprune": transprune,
    "v2drop": v2drop,
    "visiondrop": visiondrop,
    "vtw": vtw,
    "mustdrop": mustdrop,
}
