"""TOVA (arXiv 2401.06104): keeps the cache slots that the newest token attends to, the same in all heads of a layer.

Looks at: attention of the newest query, averaged over the heads. Cost: one row of attention in each layer; while
decoding, a gather of the layer's cache for each eviction.

Departs from the paper: its state has one size from the first token on. Here `keep` says what is left of the prompt and
`limit` what is held while decoding; the paper is `keep` and `limit` set to the same count. Without a limit, what is
decoded stays.
Departs from the released code: `released` is kvpress's TOVAPress, which keeps the newest token whatever it scores. The
authors' own code lets it go like any other, as the default does here.
"""

from typing import Annotated

from torch import Tensor

from winnow.contract import Between, CacheMethod, Count, KVBudget, KVView, register


@register("tova")
class TOVA(CacheMethod):
    """Keeps the slots that the newest token attends to, on average over the heads of a layer.

    Args:
        keep: slots of a head that are left of the prompt.
        keep_newest: the newest token stays whatever it scores.
        limit: slots that a head holds at most while decoding, and `every` more; none: what is decoded stays.
        every: decoded tokens between two evictions.
    """

    released = {"keep": "50%", "keep_newest": True}
    one_scale = True

    keep: KVBudget = KVBudget("20%")
    keep_newest: bool = False
    limit: Annotated[int, Between(1)] | None = None
    every: Count = 1

    def ends(self, view: KVView) -> tuple[int, int]:
        return 0, int(self.keep_newest)

    def score(self, view: KVView) -> Tensor:
        return view.attention(1).mean(1).expand(-1, view.heads, -1)
