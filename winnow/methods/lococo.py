"""LoCoCo (arXiv 2406.05317): a cache of fixed size, half heavy hitters and half learned mixtures of all other slots.

Looks at: attention of the queries of the latest forward (while decoding, of the last 64 tokens), and all keys and
values. Cost: the attention weights of each forward once more, and for each compression a convolution of m kernels over
both, O(N · m · 2d · kernel) for each KV head, and M × N weights.

The heavy hitters stay as they are. Of the other slots the next best give each mixture its prior, which is what H2O
would keep there; a convolution over keys and values gives it weights over all of them:
W = (1 − α) · prior + α · softmax(relu(conv(K, V))), one map for keys and values. It is trained through the chunk that
follows a compression, by the loss of its tokens.
Departs from the paper: slots stand in the order in which they were read, each mixture where its prior was, so that the
mixtures are not behind the heavy hitters; attention is the same. α is a sigmoid, which keeps it between 0 and 1, and
begins at 0.95 with sharp weights: keys that are blends of many get no attention from a sharp head, and then nothing to
learn from. Query heads of one KV head are averaged (the paper's models have as many of both). Where more slots are
mixed than the convolution was made for, the rest are heavy hitters; where there are fewer, its first kernels are used.
Departs from the released code: `released` is its cache; weights that its authors trained were not at hand. It scores
slots by query head, and so takes models with as many KV heads alone. A prefill longer than a chunk is compressed at
once, where its scripts read it chunk by chunk; do so with `prefill_chunk_size`, or turn by turn. Its 16 spare slots,
which the paper does not have, are `buffer` between chunks and `every` while decoding, where it looks at the query of
the latest token alone.
"""

from typing import Annotated

import torch
from torch import Tensor, nn

import winnow.contract as wn
from winnow.parts.convolved import Mixer, mixtures
from winnow.parts.learned import learned


@wn.register("lococo")
class LoCoCo(wn.CacheMethod):
    """Keeps what the latest queries attend to most, and as many learned mixtures of all the other slots.

    Args:
        keep: slots of a head, mixtures among them: a count or a share.
        verbatim: the share of them that are heavy hitters, as they are.
        alpha: the share of the convolution in a mixture; 0 is H2O by the latest queries; default: as it was trained.
        local: the last slots, which are always among the heavy hitters.
        buffer: slots above the budget up to which a prefill leaves the cache as it is.
        limit: slots that a head holds at most while decoding, and `every` more; none: what is decoded stays.
        every: decoded tokens between two compressions.
        weights: a file that `winnow train lococo` wrote, or `untrained`; default: those for the recall model.
    """

    recent = 64
    released = {"keep": 128, "buffer": 16}

    keep: wn.KVBudget = wn.KVBudget(512)
    verbatim: wn.Share = 0.5
    alpha: Annotated[float, wn.Between(0, 1)] | None = None
    local: wn.Count = 0
    buffer: wn.Count = 0
    limit: wn.Count | None = None
    every: wn.Count = 16
    weights: str | None = None

    def check(self) -> None:
        if self.keep.is_kinds or self.keep.is_mass:
            raise wn.WinnowError(f"lococo: keep={self.keep}; allowed: a count, a share, bytes, or a count by layer.")

    def build(self, info: wn.ModelInfo) -> nn.Module | None:
        plain = self.keep.value if isinstance(self.keep.value, int) else 64
        own = max(1, plain - self._heavy(plain))

        def make(mixtures: int = own, kernel: int = 21) -> nn.ModuleList:
            return nn.ModuleList(Mixer(2 * info.head_dim, mixtures, kernel) for _ in range(info.depth))

        return None if self.alpha == 0 else learned(self.slug, self.weights, info, make)

    def score(self, view: wn.KVView) -> Tensor:
        return view.per_kv_head(view.mass())

    def ends(self, view: wn.KVView) -> tuple[int, int]:
        return 0, min(view.n, self.local)

    def shorten(self, view: wn.KVView, keep: wn.KVBudget) -> wn.KVReduce | None:
        last = self.ends(view)[1]
        count = view.n if keep.is_all else max(view.budget(keep), last)
        if view.n <= count + (self.buffer if view.moment == "prefill" else 0):
            return None
        with torch.no_grad():
            scores = self.score(view)
        scores[..., view.n - last :] = torch.inf
        chosen = wn.best_slots(scores, wn.KVBudget(count), view)
        mixer = self._mixer(view)
        heavy = count if mixer is None else max(self._heavy(count), count - mixer.conv.out_channels, last)
        if mixer is None or heavy == count or chosen is None:
            return chosen
        slots = chosen.k.representatives
        matrix = mixtures(mixer, self.alpha, view.keys, view.values, scores, slots, heavy)
        return wn.keep_slots(wn.Reduction.mix(matrix, representative=slots))

    def _heavy(self, count: int) -> int:
        return int(count * self.verbatim + 1e-9)

    def _mixer(self, view: wn.KVView) -> Mixer | None:
        if self.alpha == 0:
            return None
        if view.module is None:
            raise wn.WinnowError("lococo: a view needs module=LoCoCo(…).build(info) unless alpha=0.")
        mixer: Mixer = view.module[view.layer]
        if mixer.conv.in_channels != view.keys.shape[3] + view.values.shape[3]:
            raise wn.UnsupportedError("lococo mixes keys and values of one width, which this model does not have.")
        return mixer
