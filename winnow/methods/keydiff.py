"""KeyDiff (arXiv 2504.15364): keeps the cache slots whose keys differ most from the mean key.

Looks at: keys. Cost: two norms and one product for each slot; with `block`, again for what is kept at each block.

Departs from the paper: it reads prompts in blocks of 128 and evicts after each. Here a prompt is cut after each
forward, so one that is read at once is cut once; `block=128` chooses as the paper does, block by block.
Departs from the released code: none is known of its authors; `released` is kvpress's press of that name.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from winnow.contract import (
    CacheMethod,
    Count,
    KVBudget,
    KVReduce,
    KVView,
    Reduction,
    WinnowError,
    comparable,
    keep_slots,
    ranked,
    register,
)


@register("keydiff")
class KeyDiff(CacheMethod):
    """Keeps the slots whose keys are least similar to the mean of all keys.

    Args:
        keep: slots of a head.
        block: slots that are weighed against what is kept so far at a time, the first ones being kept to begin with;
            none: all at once.
        limit: slots that a head holds at most while decoding, and `every` more; none: what is decoded stays.
        every: decoded tokens between two evictions.
    """

    released = {"keep": "50%", "block": None}

    keep: KVBudget = KVBudget("20%")
    block: Count | None = None
    limit: Count | None = None
    every: Count = 64

    def check(self) -> None:
        if self.block == 0:
            raise WinnowError("keydiff: block=0 weighs nothing; allowed: an int ≥ 1, or none.")
        if self.block is not None and (self.keep.is_kinds or self.keep.is_mass):
            raise WinnowError(
                f"keydiff: block={self.block} needs a keep that is a count, a share or bytes; leave it out."
            )

    def score(self, view: KVView) -> Tensor:
        return distinctness(view.keys)

    def shorten(self, view: KVView, keep: KVBudget) -> KVReduce | None:
        if self.block is None:
            return super().shorten(view, keep)
        count = view.budget(keep)
        if count >= view.n:
            return None
        kept = torch.arange(count, device=view.keys.device).expand(view.b, view.heads, -1)
        for start in range(count, view.n, self.block):
            later = torch.arange(start, min(start + self.block, view.n), device=kept.device)
            held = torch.cat([kept, later.expand(view.b, view.heads, -1)], 2)
            keys = view.keys.gather(2, held[..., None].expand(-1, -1, -1, view.keys.shape[3]))
            scores = comparable(distinctness(keys).flatten(0, 1))
            best = ranked(scores)[:, :count].sort(-1).values.unflatten(0, (view.b, view.heads))
            kept = held.gather(2, best)
        return keep_slots(Reduction.select(kept, view.n))


def distinctness(keys: Tensor) -> Tensor:
    """`[b, G, n]` how unlike the mean direction of `[b, G, n, d]` each one is."""
    keys = keys.float()
    return -F.cosine_similarity(keys, F.normalize(keys, dim=-1).mean(2, keepdim=True), dim=-1)
