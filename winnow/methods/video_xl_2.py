"""Video-XL-2 (arXiv 2506.19225): read a video block by block, keep whole what the question looks at, pool the rest.

Looks at: in each layer, the attention of the text behind the video to its tokens. Cost: that attention, once; a block
reads itself and a few before it, so that a long video costs O(V) and not O(V²). What each slot is, is a host read.

Units are so many visual tokens, counted from the first. In a prefill the units of a block see themselves, the blocks
right before it and all text before them; text sees all. Then units whose chunk holds one of the `relevant` units that
the question attends to most stay as they are, with the first chunk and the last; of the others the mean of each `step`
keys and of their values stays. The question itself reads this mixed cache, and so does what is decoded. The ledger says
how many entries of the attention were read (`allowed`) of those of a full prefill (`entries`), over layers.
Departs from the paper: this is the part that needs no training, on any model; its learned synthesis of four frames into
144 tokens is not built. Relevance is not found by another model: it is the attention of the question's tokens, mean
over them and over heads, in each layer by itself, or units are named (`retrieved`). A later turn reads what is left.
Departs from the released code: positions of the question are those of the whole prompt; there they go on behind the
compact cache, whose keys keep the distances of the whole. Blocks are computed one by one; there the whole is masked.
Which units are relevant is read from files there, and how many of them from the type of the question.
"""

from typing import Annotated

import torch
from jaxtyping import Bool
from torch.nn.functional import pad

import winnow.contract as wn
from winnow.parts.units import Units, chunked, dense_units, entries_of, two_levels


@wn.register("video-xl-2")
class VideoXL2(wn.CacheMethod):
    """Read a video block by block, and keep a cache of two resolutions.

    Args:
        unit: visual tokens of a unit.
        block: units of a block of the prefill; 0: it is read in full.
        previous: blocks that a block sees before itself.
        chunk: units of a chunk of the cache.
        relevant: units whose chunks stay as they are.
        step: visual tokens of the other chunks that become one.
        retrieved: units that an outside retriever names, in the place of those that the question attends to.
    """

    unit: Annotated[int, wn.Between(1)] = 144
    block: wn.Count = 4
    previous: wn.Count = 3
    chunk: Annotated[int, wn.Between(1)] = 4
    relevant: wn.Count = 4
    step: Annotated[int, wn.Between(1)] = 4
    retrieved: tuple[wn.Count, ...] | None = None

    identity = {"block": 0, "step": 1}

    def check(self) -> None:
        if self.unit % self.step:
            raise wn.WinnowError(f"video-xl-2: step={self.step} does not divide a unit of {self.unit} tokens.")

    def evict(self, view: wn.KVView, state: wn.State):
        """Before the layer attends, who reads what; behind it, the mixed cache."""
        if view.fresh != view.n or view.kinds is None:
            return wn.Observe(), wn.State()  # a later turn
        units = [Units.of(own[0], self.unit) for own in view.kinds]
        if not all(own.number for own in units):
            return wn.Observe(), wn.State()
        if view.moment == "prefill":
            left = self.left(view, units, state.token["dense"][:, 0]) if "dense" in state.token else None
            return (wn.Observe() if left is None else left), wn.State()
        dense = torch.stack([self.dense(view, own, row) for row, own in enumerate(units)])
        left = self.left(view, units, dense)
        kept = wn.State({"dense": dense[:, None].expand(-1, view.heads, -1)})
        if left is None and not self.block:
            return wn.Observe(), kept
        parts = [chunked(own, self.block, self.previous) for own in units]
        counts = [entries_of(own) for own in parts]
        view.notes.update(allowed=sum(read for read, _ in counts), entries=sum(whole for _, whole in counts))
        last = tuple(view.n - own.span[1] for own in units)
        if left is not None:
            return wn.Parted(tuple(parts), left, last), kept
        every = torch.arange(view.n, device=dense.device)  # the text behind the video reads all
        return wn.Parted(tuple((*own, (every[view.n - n :], every)) for own, n in zip(parts, last, strict=True))), kept

    def dense(self, view: wn.KVView, units: Units, row: int) -> Bool[torch.Tensor, " n"]:
        """Which slots of a sample stay as they are."""
        end = units.span[1]
        stays = torch.ones(view.n, dtype=torch.bool, device=units.slot.device)
        if self.step == 1 or (self.retrieved is None and end == view.n):
            return stays
        wanted = list(self.retrieved or ())
        if self.retrieved is None:
            seen = view.attention(at=torch.arange(end, view.n, device=stays.device))[row].mean((0, 1))[units.slot]
            total = seen.new_zeros(units.number).index_add_(0, units.unit, seen.nan_to_num(0))
            wanted = wn.ranked(total[None])[0, : self.relevant].tolist()
        stays[units.slot] = dense_units(units, wanted, self.chunk)[units.unit]
        return stays

    def left(self, view: wn.KVView, units: list[Units], dense: Bool[torch.Tensor, "b n"]) -> wn.KVReduce | None:
        """The mixed cache; None where all stays."""
        if bool(dense.all()):
            return None
        found = [two_levels(own, stays, self.step) for own, stays in zip(units, dense, strict=True)]
        most = max(len(own.first) for own in found)
        columns = ([own.target for own in found], [own.weight for own in found],
                   [pad(own.first, (0, most - len(own.first))) for own in found])  # fmt: skip
        target, weight, first = (torch.stack(own)[:, None].expand(-1, view.heads, -1) for own in columns)
        counts = tuple(len(own.first) for own in found for _ in range(view.heads))
        index = torch.arange(view.n, device=target.device).expand_as(target)
        ragged = counts if len(set(counts)) > 1 else None
        chosen = wn.Reduction(view.n, most, index, target, weight, counts=ragged, representative=first)
        return wn.KVReduce(chosen, chosen)

    def steps(self, info: wn.ModelInfo) -> tuple[wn.KVStep, ...]:
        when: tuple = ("before", "prefill")
        return tuple(wn.KVStep(wn.Point("kv", k), self.evict, when=when, kinds=True) for k in range(info.depth))
