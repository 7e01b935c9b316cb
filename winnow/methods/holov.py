"""HoloV (arXiv 2510.02912): share the budget over strips of the picture by how much they hold, and pick in each strip.

Looks at: one [CLS] row of the feature block (all queries where there is no [CLS]) and the projected tokens. Cost:
O(V² · D / C) for the similarities inside C crops, then O(V log V).

Crops are C equal parts of the token sequence, so strips of rows. In each, a token's diversity is the variance of its
cosine similarities to the others (its own entry counts as 0), scaled so that its mean is that of the attention; its
holistic score is attention + `diversity` · variance. A crop's quota is its share of the mean scores: by the scaling its
share of the attention, whatever `diversity` is, which acts on the ranking inside a crop alone.
Departs from the paper: what a crop cannot take goes to the best tokens of all others; the paper shares it out again.
Its refetching of dropped tokens inside the language model is left out. C is that of the code for Qwen2.5-VL, 16/9 of N
over the budget, which makes LLaVA's 16 at 64 of 576.
Departs from the released code: the code ranks by attention alone (`by=attention`), with `diversity=0.09` and, for
LLaVA, `crops=16`. With `order=attention` tokens come crop by crop, those with more attention first, without newlines,
and what a crop cannot take is lost: there the code pads with zeros. Positions are kept by default, as for all methods
of winnow; the code for LLaVA numbers them anew. For Qwen2.5-VL the code overwrites its attention with ones.
"""

from functools import lru_cache
from typing import Annotated, Literal

import torch
from jaxtyping import Float, Int
from torch.nn.functional import pad
from torch.nn.utils.rnn import pad_sequence

import winnow.contract as wn
from winnow.parts.cosine import unit

EPSILON = 1e-6


@wn.register("holov")
class HoloV(wn.Method):
    """Keep the best tokens of each strip of the picture, as many as its attention earns it.

    Args:
        keep: content tokens of the item.
        crops: strips, at most one for each token; default: see above.
        diversity: weight of the variance of similarities.
        by: what ranks the tokens of a crop: the `holistic` score or `attention`.
        order: of what is kept: `raster`, or as released, crop by crop with the highest `attention` first; then what a
            crop cannot take is lost.
        row: the attention.
    """

    keep: wn.Budget = wn.Budget(64)
    crops: Annotated[int, wn.Between(1)] | None = None
    diversity: Annotated[float, wn.Between(0)] = 1.0
    by: Literal["holistic", "attention"] = "holistic"
    order: Literal["raster", "attention"] = "raster"
    row: wn.VisionAttention = wn.VisionAttention(query="auto")

    rounding = "floor"
    released = {
        "crops": 16,
        "diversity": 0.09,
        "by": "attention",
        "order": "attention",
        "row": wn.VisionAttention(),
        "positions": "compact",
    }

    def steps(self, info: wn.ModelInfo):
        separators = "keep" if self.order == "raster" else "drop"
        act = lambda view, state: wn.Reduce(self.reduce(view), separators)  # noqa: E731
        return (wn.Step(wn.Point("projected"), act, self.signals()),)

    def reduce(self, view: wn.View) -> wn.Reduction:
        k = min(self.keep.of(view), view.n)
        x, broken = unit(view.tokens)
        wn.count_broken(broken, view)
        attention = wn.comparable(view[self.row], view).masked_fill(broken, -torch.inf)
        sizes = wn.split_evenly(view.n, [view.n] * min(view.n, self.crops or max(1, int(16 / 9 * view.n / k))))
        place, spot = (table.to(view.ids.device) for table in _crops(sizes))
        scores, weight = self._scores(x, attention, place)
        scores = scores.flatten(1)[:, spot].masked_fill(attention == -torch.inf, -torch.inf)
        crop = (spot // place.shape[1]).expand(view.b, -1)
        if sizes[-1] == 1 and self.order == "attention":  # the code forgets to scale the attention of a lone token
            weight[:, sizes.index(1) :] /= 1000
        ranks = scores if self.by == "holistic" else attention
        chosen = wn.rank_in_tile(ranks, crop) < (quota := self._quotas(weight, k)).gather(1, crop)
        if self.order == "raster":
            return wn.top_k(ranks.masked_fill(chosen & (ranks > -torch.inf), torch.inf), k)
        whole = (quota >= torch.tensor(sizes, device=crop.device)).gather(1, crop)  # stands in its own order
        turn = wn.rank_in_tile(attention.masked_fill(whole, 0), crop) + crop * view.n
        order, counts = turn.masked_fill(~chosen, view.n**2).argsort(1), tuple(chosen.sum(1).tolist())
        return wn.Reduction.select(order[:, : max(counts)], view.n, counts=counts, ordered=False)

    def _scores(
        self, x: list[Float[torch.Tensor, "n d"]], attention: Float[torch.Tensor, "b n"], place: torch.Tensor
    ) -> tuple[Float[torch.Tensor, "b c s"], Float[torch.Tensor, "b c"]]:
        """The holistic score of the tokens of each crop, and their mean."""
        real = place < attention.shape[1]
        size = real.sum(1, keepdim=True)
        others = (size - 1).clamp_min(1)
        seen = pad(attention.masked_fill(attention == -torch.inf, 0) * 1000, (0, 1))[:, place]
        variance = torch.empty_like(seen)
        for own, item in zip(variance, x, strict=True):  # item by item: a batch has the bits of its items
            part = pad(item, (0, 0, 0, 1))[place]
            alike = torch.bmm(part, part.mT)
            alike.diagonal(dim1=1, dim2=2).zero_()
            mean = alike.sum(2) / others
            own.copy_((alike.square_().sum(2) - (size - 2) * mean.square()) / others * real)
        ratio = seen.abs().sum(2, True) / size / (variance.abs().sum(2, True) / size + EPSILON)
        score = seen + self.diversity * variance * ratio
        return score, score.sum(2) / size[:, 0]

    def _quotas(self, weight: Float[torch.Tensor, "b c"], k: int) -> Int[torch.Tensor, "b c"]:
        share = weight / (weight.sum(1, keepdim=True) + EPSILON)
        quota = (share * k).floor().long()
        return quota + (wn.rank_of(share) < k - quota.sum(1, keepdim=True))


@lru_cache(maxsize=64)
def _crops(sizes: tuple[int, ...]) -> tuple[Int[torch.Tensor, "c s"], Int[torch.Tensor, " n"]]:
    """The tokens of each crop (N where there is none), and the spot of each token in that table."""
    parts = torch.arange(sum(sizes)).split(sizes)
    place = pad_sequence(parts, batch_first=True, padding_value=sum(sizes))
    return place, place.flatten().argsort()[: sum(sizes)]
