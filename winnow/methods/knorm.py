"""L2 norm of keys (arXiv 2406.11430): keeps the cache slots whose keys are short.

Looks at: keys. Cost: one norm for each slot.

Departs from the paper: all layers are compressed; its experiments leave the first two whole (`skip=2`).
Departs from the released code: a share of the slots is rounded down, as in kvpress, where the authors' own code rounds
up, and prompts of any length are cut.
"""

from torch import Tensor

from winnow.contract import CacheMethod, Count, KVBudget, KVView, ModelInfo, register


@register("knorm")
class KNorm(CacheMethod):
    """Keeps the slots whose keys have the smallest norm, which tend to be those that get attention.

    Args:
        keep: slots of a head.
        skip: layers at the beginning that are left whole.
        limit: slots that a head holds at most while decoding, and `every` more; none: what is decoded stays.
        every: decoded tokens between two evictions.
    """

    released = {"keep": "50%", "skip": 0}

    keep: KVBudget = KVBudget("20%")
    skip: Count = 0
    limit: Count | None = None
    every: Count = 64

    def score(self, view: KVView) -> Tensor:
        return -view.keys.float().norm(dim=-1)

    def steps(self, info: ModelInfo):
        return super().steps(info)[self.skip :]
