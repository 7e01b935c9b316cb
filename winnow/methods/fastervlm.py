"""FasterVLM (arXiv 2412.01818): keep the patches that the vision encoder's [CLS] token attends to.

Looks at: one attention row of one vision block. Cost: O(V · D) for the row, then O(V log V).

Departs from the paper: on towers without [CLS] a token's score is the attention that it receives from all queries.
Departs from the released code: the row alone is computed, not the maps of every block; with tiles, newlines stay and
the budget is that of the whole item, split equally (the code's 29 for each of 5 crops is `keep=145` here).
"""

from winnow.contract import Budget, Method, View, VisionAttention, register


@register("fastervlm")
class FasterVLM(Method):
    """Keep the patches that the vision encoder's [CLS] attends to.

    Args:
        keep: content tokens of the item, split equally over its tiles.
        row: the attention that ranks them.
    """

    keep: Budget = Budget(64)
    row: VisionAttention = VisionAttention(query="auto")

    per_tile = True

    def score(self, view: View):
        return view[self.row]
