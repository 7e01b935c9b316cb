"""ZipVL (arXiv:2410.08584): in each layer, only the tokens that hold most of the attention attend, and are cached.

Looks at: attention of `last` + `random` probe queries, averaged over heads. Cost: their rows of attention in each
layer, once; the number of tokens is read on the host.

A layer takes as many tokens as hold the share `mass` of what the probes attend to, and of all tokens those that a probe
attends to most, counting only the probes that can see them. In the prompt they attend to one another alone; the others
pass the layer's attention by. This is the second version of the paper, which evicts the others; the first one stores
them in fewer bits.

Departs from the paper: where it leaves a choice, all heads have one set, and the last `last` tokens are always in it;
importance is not estimated anew while decoding. A later turn attends to all that is left, and chooses behind that.
Departs from the released code: no code has been released.
"""

from typing import Annotated

import torch
from torch import Tensor

from winnow.contract import (
    Attend,
    Between,
    CacheMethod,
    Count,
    KVBudget,
    KVReduce,
    KVStep,
    KVView,
    ModelInfo,
    Observe,
    Point,
    Reduction,
    State,
    comparable,
    keep_slots,
    rank_of,
    register,
)


@register("zipvl")
class ZipVL(CacheMethod):
    """In each layer, only the tokens that hold most of the attention attend in the prompt, and are cached.

    Args:
        keep: slots of a layer: a share of the attention's mass, or any other budget.
        last: tokens at the end of the prompt that are probes, and stay.
        random: probes among the tokens before them.
    """

    keep: KVBudget = KVBudget("mass=0.975")
    last: Annotated[int, Between(1)] = 64
    random: Count = 64

    def probes(self, view: KVView) -> Tensor:
        """Places of the probes among the queries; the same for all samples."""
        q = view.queries.shape[2]
        last = view.rows(self.last)
        others = view.rand(q - last)[0].argsort()[: self.random].sort().values
        return torch.cat([others, torch.arange(q - last, q, device=others.device)])

    def mass(self, view: KVView) -> tuple[Tensor, Tensor]:
        """`[b, N]` attention that each token gets from the probes in all, and from one that can see it."""
        at = self.probes(view)
        whole = view.attention(at=at).mean(1).sum(1)
        return whole, whole / view.visible(at=at).sum(1).clamp_min(1)

    def score(self, view: KVView) -> Tensor:
        return self.mass(view)[1][:, None].expand(-1, view.heads, -1)

    def chosen(self, view: KVView) -> KVReduce | None:
        """The tokens of this layer; None: all."""
        if not self.keep.is_mass:
            return self.shorten(view, self.keep)
        whole, score = self.mass(view)
        last = view.rows(self.last)
        need = fewest(whole, self.keep.mass).clamp_min(last)
        score = torch.cat([comparable(score)[:, :-last], torch.full_like(score[:, -last:], torch.inf)], 1)
        if int(need.min()) >= view.n:
            return None
        stays = (rank_of(score) < need[:, None])[:, None].expand(-1, view.heads, -1)
        return keep_slots(Reduction.select(stays, counts=need.repeat_interleave(view.heads).tolist()))

    def ends(self, view: KVView) -> tuple[int, int]:
        return 0, view.rows(self.last)

    def evict(self, view: KVView, state: State):
        """Before the layer attends, its tokens are chosen; behind it, the cache keeps them alone."""
        if "kept" in state.token:
            return keep_slots(Reduction.select(state.token["kept"])), State()
        found = self.chosen(view)
        if found is None:
            return Observe(), State()
        if view.moment == "prefill":
            return found, State()
        rows, stays = found.k, torch.zeros_like(view.keys[..., 0], dtype=torch.bool)
        counts = None if rows.counts is None else rows.counts[:: view.heads]
        stays.scatter_(2, rows.representatives, rows.valid)
        return Attend(Reduction.select(rows.representatives[:, 0], view.n, counts=counts)), State({"kept": stays})

    def steps(self, info: ModelInfo) -> tuple[KVStep, ...]:
        return tuple(KVStep(Point("kv", k), self.evict, when=("before", "prefill")) for k in range(info.depth))  # type: ignore[arg-type]


def fewest(mass: Tensor, share: float) -> Tensor:
    """`[b]` of `[b, N]`: the fewest tokens that hold a share of the mass; 1: all that hold any."""
    held = mass.double().nan_to_num(0).sort(1, descending=True).values
    if share >= 1:
        return (held > 0).sum(1)
    total = held.cumsum(1)
    return (total < share * total[:, -1:]).sum(1) + 1
