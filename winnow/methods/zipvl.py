"""ZipVL (arXiv:2410.08584): in each layer, only the tokens that hold most of the attention attend, and are cached well.

Looks at: attention of `last` + `random` probe queries, averaged over heads. Cost: their rows of attention in each
layer, once; the number of tokens is read on the host.

A layer takes as many tokens as hold the share `mass` of what the probes attend to, and of all tokens those that a probe
attends to most, counting only the probes that can see them. In the prompt they attend to one another alone; the others
pass the layer's attention by. The second version of the paper then evicts the others (`kv=evict`). The first one keeps
them in fewer bits (`kv=mixed`): keys by channel, values by token, after each channel is divided by the root of its
largest magnitude.

Departs from the paper: where it leaves a choice, all heads have one set, and the last `last` tokens are always in it;
importance is not estimated anew while decoding, and decoded tokens stay as they are. A later turn attends to all that
is left, and chooses behind that; with `kv=mixed` it stays as it is.
Departs from the released code: no code has been released.
"""

from typing import Annotated, Literal

import torch
from torch import Tensor

import winnow.contract as wn
from winnow.parts.forms import Both
from winnow.parts.mixed import Mixed


@wn.register("zipvl")
class ZipVL(wn.CacheMethod):
    """In each layer, only the tokens that hold most of the attention attend in the prompt, and are cached well.

    Args:
        keep: slots of a layer: a share of the attention's mass, or any other budget.
        last: tokens at the end of the prompt that are probes, and stay.
        random: probes among the tokens before them.
        kv: what becomes of the other tokens in the cache: they go, or take fewer bits.
        bits: of the tokens of a layer, with `kv=mixed`.
        low: bits of the others.
    """

    keep: wn.KVBudget = wn.KVBudget("mass=0.975")
    last: Annotated[int, wn.Between(1)] = 64
    random: wn.Count = 64
    kv: Literal["evict", "mixed"] = "evict"
    bits: Literal[2, 3, 4, 8] = 4
    low: Literal[2, 3, 4, 8] = 2

    def probes(self, view: wn.KVView) -> Tensor:
        """Places of the probes among the queries; the same for all samples."""
        q = view.queries.shape[2]
        last = view.rows(self.last)
        others = view.rand(q - last)[0].argsort()[: self.random].sort().values
        return torch.cat([others, torch.arange(q - last, q, device=others.device)])

    def mass(self, view: wn.KVView) -> tuple[Tensor, Tensor]:
        """`[b, N]` attention that each token gets from the probes in all, and from one that can see it."""
        at = self.probes(view)
        whole = view.attention(at=at).mean(1).sum(1)
        return whole, whole / view.visible(at=at).sum(1).clamp_min(1)

    def score(self, view: wn.KVView) -> Tensor:
        return self.mass(view)[1][:, None].expand(-1, view.heads, -1)

    def ends(self, view: wn.KVView) -> tuple[int, int]:
        return 0, view.rows(self.last)

    def chosen(self, view: wn.KVView) -> wn.KVReduce | None:
        """The tokens of this layer; None: all."""
        if not self.keep.is_mass:
            return self.shorten(view, self.keep)
        whole, score = self.mass(view)
        last = view.rows(self.last)
        need = fewest(whole, self.keep.mass).clamp_min(last)
        score = torch.cat([wn.comparable(score)[:, :-last], torch.full_like(score[:, -last:], torch.inf)], 1)
        if int(need.min()) >= view.n:
            return None
        stays = (wn.rank_of(score) < need[:, None])[:, None].expand(-1, view.heads, -1)
        return wn.keep_slots(wn.Reduction.select(stays, counts=need.repeat_interleave(view.heads).tolist()))

    def evict(self, view: wn.KVView, state: wn.State):
        """Before the layer attends, its tokens are chosen; behind it, the cache keeps them, alone or better."""
        stays = state.token.get("kept")
        if stays is None:
            found, stays = self.chosen(view), torch.ones_like(view.keys[..., 0], dtype=torch.bool)
            if found is not None:
                stays = torch.zeros_like(stays).scatter_(2, found.k.representatives, found.k.valid)
        if view.moment == "before":
            rows = wn.Reduction.select(stays[:, 0])
            return (wn.Observe() if rows.m == view.n and rows.counts is None else wn.Attend(rows)), wn.State(
                {"kept": stays}
            )
        if self.kv == "mixed":
            return wn.Codec(lambda keys, values: self.stored(keys, values, stays[:, 0])), wn.State()
        kept = wn.Reduction.select(stays)
        return (wn.Observe() if kept.m == view.n and kept.counts is None else wn.keep_slots(kept)), wn.State()

    def stored(self, keys: Tensor, values: Tensor, kept: Tensor) -> Both:
        """The cache in two kinds of integers."""
        bits = (self.bits, self.low)
        return Both(Mixed.of(keys, kept, "tokens", bits), Mixed.of(values, kept, "channels", bits), keys.shape[2])

    def steps(self, info: wn.ModelInfo) -> tuple[wn.KVStep, ...]:
        return tuple(wn.KVStep(wn.Point("kv", k), self.evict, when=("before", "prefill")) for k in range(info.depth))


def fewest(mass: Tensor, share: float) -> Tensor:
    """`[b]` of `[b, N]`: the fewest tokens that hold a share of the mass; 1: all that hold any."""
    held = mass.double().nan_to_num(0).sort(1, descending=True).values
    if share >= 1:
        return (held > 0).sum(1)
    total = held.cumsum(1)
    return (total < share * total[:, -1:]).sum(1) + 1
