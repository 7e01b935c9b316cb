"""Recoverable Compression (arXiv 2409.01179): keep salient tokens, recover those of the question, and merge the rest.

Looks at: one attention row and the keys of the last vision block, all heads taken as one, and the question. Cost:
O(V · C) for the row and the question, O(centres · V · C) for merging, O(V · log V) for outliers.

How many tokens there are of each kind is the number of outliers among the scores, so it differs from picture to picture
(one host read); `keep` makes the total exact and leaves the proportions.
By default similarity to the question is that of projected tokens and LM input embeddings (`text=lm`), a variant for
models whose CLIP text tower is not at hand; the paper's space is that of CLIP (`text=clip`), handed over.
Departs from the paper: tokens are merged behind the projector, not before it, because pictures are encoded before the
question is known; towers without [CLS] give the mean over all queries.
Departs from the released code: `text=lm` for `text=clip`, see above, and four slips of it, which `legacy=true` repeats:
it counts centres from the width of the features, not the tokens kept so far, compares the keys of other tokens than it
means, forgets the last token where there is no centre, and reads CLIP's text at the last of 77 places, not at its end.
Separators are dropped. Positions are kept by default, as for all methods of winnow; the code numbers them anew.
"""

from typing import Annotated, Literal

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

import winnow.contract as wn
from winnow.parts.cosine import product, unit
from winnow.parts.outliers import outliers
from winnow.parts.recycle import recycled

JOINT = 768  # width of CLIP-L's space, whose root divides the cosines


@wn.register("recoverable-compression")
class RecoverableCompression(wn.Method):
    """Keep salient tokens and those like the question, and merge the rest into a few; outliers say how many.

    Args:
        keep: all outputs of the item, in the proportions that the outliers say; none: as many as they say.
        text: what similarity to the question is measured by: LM embeddings (`lm`), or a CLIP handed over (`clip`).
        recover: whether tokens that are like the question are recovered at all.
        rule: what an outlier is: by Local Outlier Factor (`lof`), or above the upper quartile's fence (`iqr`).
        neighbours: of the outlier factors: of attention and similarity, and of the rest.
        merged: tokens that each centre takes up.
        pull: how much similarity to the question counts beside that of keys when a centre chooses them.
        legacy: repeats what the released code does by mistake.
        row, keys, question, patches: what it looks at.
    """

    keep: wn.Budget | None = None
    text: Literal["lm", "clip"] = "lm"
    recover: bool = True
    rule: Literal["lof", "iqr"] = "lof"
    neighbours: tuple[Annotated[int, wn.Between(1)], ...] = (20, 10)
    merged: Annotated[int, wn.Between(1)] = 32
    pull: Annotated[float, wn.Between(0)] = 50.0
    legacy: bool = False
    row: wn.OneHeadAttention = wn.OneHeadAttention(layer=-1, query="auto")
    keys: wn.WideKeys = wn.WideKeys(layer=-1)
    question: wn.QuestionCosine = wn.QuestionCosine(words="question", pool="mean")
    patches: wn.ClipPatches = wn.ClipPatches(layer=-1, norm=False)

    separators = "drop"
    identity = None
    released = {"text": "clip", "legacy": True, "positions": "compact"}

    def check(self) -> None:
        if len(self.neighbours) != 2:
            raise wn.WinnowError(f"recoverable-compression: neighbours={self.neighbours}; allowed: two counts.")

    def signals(self):
        words = wn.ClipText(pool="end" if self.legacy else "eot")
        return (self.row, self.keys, *((self.question,) if self.text == "lm" else (self.patches, words)))

    def reduce(self, view: wn.View) -> wn.Reduction:
        keys, lost = unit(view[self.keys])
        row, like = (x.to(torch.promote_types(x.dtype, torch.float32)) for x in (view[self.row], self._likeness(view)))
        broken = lost | ~(row + like + view.tokens.sum(-1)).isfinite()
        wn.count_broken(broken, view)
        row, like, there = row.masked_fill(broken, -torch.inf), like.masked_fill(broken, -torch.inf), ~broken
        n = there.sum(1, keepdim=True)
        v = self._share(row, there, 0, n)
        lowest = like.masked_fill(broken, torch.inf).amin(1, keepdim=True)
        t = self._share(torch.where(wn.rank_of(row) < v, lowest, like), there, 0, n - v) * self.recover
        main = self._main(row, like, v, t)
        rest = there & ~main
        width = torch.full_like(v, keys[0].shape[1])
        c = self._share(row, rest, 1, width if self.legacy else v + t).minimum(n - v - t)
        extra = (c < n - v - t) & ((c > 0) | (not self.legacy))
        rows = None if self.keep is None else min(self.keep.of(view), view.n)
        if rows is not None:  # an exact total, in the same proportions
            extra = (n > rows) & (rows > 1)
            of, whole = rows - extra.long(), (v + t + c).clamp_min(1)
            t, c = of * t // whole, of * c // whole * extra
            main = self._main(row, like, of - t - c, t)
            rest = there & ~main
        if self.legacy:  # the key of the token whose number in the picture is this one's number in the rest
            keys = [key[place] for key, place in zip(keys, (rest.cumsum(1) - 1).clamp_min(0), strict=True)]
        counts: tuple[int, ...] | None = None
        if rows is None:
            totals = torch.cat([main.sum(1, keepdim=True) + c + extra, c], 1).tolist()  # the one host read
            counts, rows = tuple(total for total, _ in totals), max(own for _, own in totals)
        return recycled(main, rest, row, c, extra, keys, self.pull * like, self.merged, rows, counts)

    def _likeness(self, view: wn.View) -> Float[Tensor, "b n"]:
        """To the question, as the code divides it by the root of the width."""
        if self.text == "lm":
            return view[self.question].mean(-1) * JOINT**-0.5
        patches, broken = unit(view[self.patches])
        cosines = product(patches, unit(view[self.signals()[-1]])[0]).mean(-1) * patches[0].shape[1] ** -0.5
        return cosines.masked_fill(broken, torch.nan)

    def _share(self, scores: Tensor, among: Tensor, which: int, of: Int[Tensor, "b 1"]) -> Int[Tensor, "b 1"]:
        """As many of some tokens as there are outliers among the scores, rounded down as the code does."""
        found = outliers(scores, self.neighbours[which], self.rule, among)[:, None]
        return (of * (found / among.sum(1, keepdim=True).clamp_min(1).double())).floor().long()

    def _main(self, row: Tensor, like: Tensor, v: Tensor, t: Tensor) -> Bool[Tensor, "b n"]:
        """The v most salient tokens, and of the others the t that are most like the question."""
        salient = wn.rank_of(row) < v
        behind = torch.where(salient, -torch.inf, like.masked_fill(like == -torch.inf, torch.finfo(like.dtype).min))
        return salient | (wn.rank_of(behind) < t)
