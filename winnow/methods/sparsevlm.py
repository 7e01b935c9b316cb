"""SparseVLM (arXiv 2410.04417): cut the image tokens that relevant words do not look at, and merge some of the dropped.

Looks at: what enters the LM, once, and the attention rows of the text behind the image in one layer for each cut. Cost:
O(H · T · S · D) for the rows, O(M² · D) for clustering M tokens, about a tenth of those that entered a cut.

Raters are the words to which image tokens are more alike than to the mean word (softmax over the words of the products
of embeddings, mean over the tokens). A token's score is the mean attention that raters pay it. Of the tokens that a cut
drops, the best 30 % are clustered by density peaks, ten to a cluster, and means take the places behind the kept tokens.
As published, LLaVA's 32 layers are cut before layers 3, 7 and 16 (behind 2, 6 and 15).
Departs from the paper: counts are a schedule, as in the code; the paper drops λ · (tokens − rank of the raters'
attention), nearly a fixed share too where raters are few.
Departs from the released code: clusters are among the tokens that a cut leaves, so that budgets are exact; in the code
they come on top of the published tables (`added=true`, `counts=[300,200,110]`). The words that a chat template puts
behind the question are no raters (`suffix=true`). No noise is added to densities. Any batch size, picture and budget.
Newlines are dropped with the first cut that merges. Positions are kept by default, as for all methods of winnow; the
code numbers anew what is left after each cut. Its second version (`USE_VERSION=2_0`) is not here: it keeps positions,
merges nothing, divides attention by that of equal queries and keys, and takes the 14 heads that see the image most.
"""

from typing import Annotated, Literal

import torch

import winnow.contract as wn
from winnow.parts.cuts import check_cuts, cuts_of, geometric
from winnow.parts.density_peaks import density_peaks

DEPTHS = (3 / 32, 7 / 32, 16 / 32)


@wn.register("sparsevlm")
class SparseVLM(wn.Method):
    """Keep ever fewer image tokens at three depths of the LM, by the attention of relevant words; merge some others.

    Args:
        counts: budgets of the cuts, all of the tokens that entered the LM; the defaults are the code's table for 192
            tokens, as shares of 576.
        layers: LM layers before which the cuts are made, ascending; default: at the published shares of the depth.
        recycle: share of the dropped tokens that is merged; 0: none.
        members: tokens of a cluster on average.
        added: whether clusters are left beside the counts, or are among them.
        suffix: whether the words behind the question can be raters.
    """

    counts: tuple[wn.Budget, ...] = (wn.Budget("52.1%"), wn.Budget("34.73%"), wn.Budget("19.1%"))
    layers: tuple[wn.Layer, ...] | None = None
    recycle: wn.Share = 0.3
    members: Annotated[int, wn.Between(1)] = 10
    added: bool = False
    suffix: bool = False

    rounding = "floor"
    identity = {"counts": ("100%", "100%", "100%")}
    released = {"counts": (300, 200, 110), "added": True, "suffix": True, "positions": "compact"}

    def check(self) -> None:
        check_cuts("sparsevlm", self.layers, self.counts, len(DEPTHS))

    def at_budget(self, budget, content: int):
        """Equal steps down to the budget, clusters included."""
        return self.replace(counts=geometric(budget, content, len(self.counts), self.rounding), added=False)

    def resolve(self, info: wn.ModelInfo):
        cuts = cuts_of(info, self.layers, DEPTHS, self.counts)
        return self.replace(counts=tuple(cuts.values()), layers=tuple(cuts))

    def steps(self, info: wn.ModelInfo):
        return tuple(map(self._step, self.layers or (), self.counts))

    def _step(self, layer: int, budget: wn.Budget) -> wn.Step:
        text: Literal["question", "all"] = "all" if self.suffix else "question"
        raters, words = wn.TextRaters(0, text), wn.WordAttention(layer - 1, text)

        def run(view: wn.View, state: wn.State) -> wn.Reduce:
            reduction = self.cut(view, raters, words, budget)
            return wn.Reduce(reduction, "keep" if reduction.is_selection else "drop")

        return wn.Step(wn.Point("layers", layer), run, (raters, words))

    def split(self, budget: wn.Budget, n: int, n_lm: int) -> tuple[int, int, int]:
        """How many of n tokens a cut keeps, how many of the others it merges, and into how many clusters."""
        total = min(budget.of(n_lm), n - 1 if self.added else n)
        if not self.recycle or total == n:
            return total, 0, 0
        sizes = [(k, int((n - k) * self.recycle) + 1) for k in range(total, -1, -1)]
        fits = ((k, merged, merged // self.members + 1) for k, merged in sizes)
        found = ((k, m, c) for k, m, c in fits if self.added or (k and k + c <= total))
        return next(found, (total, 0, 0))  # where clusters alone would exceed the count, there are none

    def cut(self, view: wn.View, raters: wn.TextRaters, words: wn.WordAttention, budget: wn.Budget) -> wn.Reduction:
        """The map of the cut before the layer behind the one whose attention is given."""
        kept, merged, clusters = self.split(budget, view.n, view.n_lm)
        order = wn.ranked(wn.comparable(self.score_by(view[words], view[raters]), view))
        best = order[:, :kept].sort(1).values
        if not clusters:
            return wn.Reduction.select(best, view.n)
        others = order[:, kept : kept + merged]
        x = view.tokens.gather(1, others[..., None].expand(-1, -1, view.tokens.shape[-1]))
        centres, owner = density_peaks(x, clusters, ~x.isfinite().all(-1))
        cluster = torch.full_like(order, -1).scatter(1, others, torch.where(owner < 0, -1, owner + kept))
        cluster.scatter_(1, best, torch.arange(kept, device=best.device).expand_as(best))
        size = view.tokens.new_zeros(view.b, kept + clusters, dtype=torch.float32)
        size.scatter_add_(1, cluster.clamp_min(0), (cluster >= 0).float())
        representative = torch.cat([best, others.gather(1, centres)], 1)
        weight = 1 / size.gather(1, cluster.clamp_min(0))
        return wn.Reduction.assign(cluster, weight, m=kept + clusters, representative=representative, ordered=False)

    @staticmethod
    def score_by(attention: torch.Tensor, raters: torch.Tensor) -> torch.Tensor:
        """`[b, N]` the mean attention of the raters, from that of all words; of all words where none is a rater."""
        rates = raters > 0
        rates = torch.where(rates.any(1, keepdim=True), rates, True)[:, None]
        wide = attention.to(torch.promote_types(attention.dtype, torch.float32))
        return torch.where(rates, wide, 0).sum(-1) / rates.sum(-1)
