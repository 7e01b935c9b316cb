"""DivPrune (arXiv 2503.02175): keep the tokens whose smallest pairwise distance is largest, whatever they show.

Looks at: the projected tokens only. Cost: O(V² · D) for the start, then O(k · V); above 8,192 tokens without a V × V
table, O(k · V · D).

Departs from the paper: nothing.
Departs from the released code: a running minimum instead of a new one over all that is selected; distances in fp32, so
that rounding cannot select a token twice. With tiles newlines are not in the pool: they belong to the layout, and stay.
Positions are kept by default, as for all methods of winnow; the code numbers them anew.
"""

import torch

from winnow.contract import Budget, Method, Reduction, View, count_broken, register
from winnow.parts.cosine import neighbours, unit
from winnow.parts.greedy import greedy


@register("divprune")
class DivPrune(Method):
    """Keep mutually distant tokens (greedy max–min of cosine distance).

    Args:
        keep: content tokens of the item. The default is that of the code, as is that halves of a token round to even.
    """

    keep: Budget = Budget("9.8%")

    pairwise = True
    rounding = "half-even"
    released = {"positions": "compact"}

    def reduce(self, view: View) -> Reduction:
        x, broken = unit(view.tokens)
        count_broken(broken, view)
        rows, closest = neighbours(x)
        loneliest = closest.masked_fill(broken, torch.inf).argmin(1, keepdim=True)
        picks = greedy(rows, loneliest, min(self.keep.of(view), view.n), broken=broken)
        return Reduction.select(picks.sort(1).values, view.n)
