"""FasterVLM (arXiv 2412.01818): keep the patches that the vision encoder's [CLS] token attends to.

Looks at: one attention row of one vision block. Cost: O(V · D) for the row, then O(V log V).

Departs from the paper: on towers without [CLS] a token's score is the attention that it receives from all queries.
Departs from the released code: `keep` is for the whole item (29 for each of 5 crops is 145), and newlines stay. By
default padding takes no part, on which the code may waste tokens (`padding=true`), and positions are not numbered anew.
"""

from winnow.contract import Budget, Method, ModelInfo, View, VisionAttention, register
from winnow.parts.tower import among_all_patches


@register("fastervlm")
class FasterVLM(Method):
    """Keep the patches that the vision encoder's [CLS] attends to.

    Args:
        keep: content tokens of the item, split equally over its tiles.
        row: the attention that ranks them.
        padding: whether patches that unpadding removes from a tile take part; those that are kept are then lost.
    """

    keep: Budget = Budget(64)
    row: VisionAttention = VisionAttention(query="auto")
    padding: bool = False

    per_tile = True
    released = {"row": VisionAttention(), "padding": True, "positions": "compact"}

    def steps(self, info: ModelInfo):
        return (among_all_patches(self),) if self.padding else super().steps(info)

    def score(self, view: View):
        return view[self.row]
