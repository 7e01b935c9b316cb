"""MiniCache (arXiv:2405.14366): two neighbouring layers of the upper half store one direction for each token.

Looks at: keys and values of two layers. Cost: a few operations on them for each block, and one product whenever it is
read. Layers, not tokens, share: of the whole cache at most a quarter is saved, or more with `bits`.

Departs from the paper: angles are taken from |u − v| and |u + v|, which is exact for small ones as well; later tokens
are merged `every` at a time (1: each at once, as in the paper, in a block of its own). Whether one direction is of a
whole hidden vector or of each head is not certain there (`unit`).

Departs from the released code: none is known.
"""

from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor

import winnow.contract as wn
from winnow.parts.forms import Both, Form, Lines, Plain, lines_of
from winnow.parts.quantize import Quantized
from winnow.parts.shared import Half, Shared, slerp


@wn.register("minicache")
class MiniCache(wn.CacheMethod):
    """Stores one direction for each token of two neighbouring layers, and the two lengths.

    Args:
        start: the lower layer of the first pair; none: half of the depth. Below a quarter of it is refused.
        t: weight of the upper layer in the direction that is shared.
        gamma: tokens stay unmerged whose angle lies within this share of the range from the largest; 1: all do.
        unit: what has one direction: each head of a token, or the token.
        bits: of the direction; 16: as it is.
        every: later tokens that wait, stored as they are, before they are merged; 0: they stay.
    """

    identity = {"gamma": 1.0}

    start: wn.Layer | None = None
    t: wn.Share = 0.6
    gamma: wn.Share = 0.05
    unit: Literal["head", "token"] = "head"
    bits: Literal[16, 8, 4, 3, 2] = 16
    every: wn.Count = 64

    def steps(self, info: wn.ModelInfo) -> tuple[wn.KVStep, ...]:
        start = info.depth // 2 if self.start is None else self.start
        if not info.depth / 4 <= start < info.depth - 1:
            raise wn.WinnowError(
                f"minicache: start={start}: pairs begin in layers {-(-info.depth // 4)} … {info.depth - 2} of the "
                f"{info.depth} of {info.model}; lower ones differ too much to be merged."
            )
        return tuple(wn.KVStep(wn.Point("kv", k), self.evict) for k in range(start + 1, info.depth, 2))  # type: ignore[arg-type]

    def evict(self, view: wn.KVView, state: wn.State) -> tuple[wn.Action, wn.State]:
        if self.gamma == 1:
            return wn.Observe(), state
        return wn.Codec(self.encode, every=self.every, pair=True), state

    def encode(self, below_k: Tensor, below_v: Tensor, keys: Tensor, values: Tensor) -> tuple[Both, Both]:
        """The blocks of the lower layer and of the upper one."""
        k, v = self.merged(below_k, keys), self.merged(below_v, values)
        return Both(k[0], v[0], keys.shape[2]), Both(k[1], v[1], keys.shape[2])

    def merged(self, *pair: Float[Tensor, "b g n d"]) -> tuple["Half", "Half"]:
        """Both tensors by their shared direction."""
        heads, dtype = pair[0].shape[1], pair[0].dtype
        whole = self.unit == "token"
        x = [lines_of(own, "channels")[:, None].float() if whole else own.float() for own in pair]  # [b, U, n, w]
        size = [own.norm(dim=3) for own in x]
        # A vector without a direction takes that of its partner.
        unit = [own / n[..., None].clamp_min(1e-30) for own, n in zip(x, size, strict=True)]
        unit = [torch.where(n[..., None] > 0, u, unit[1 - i]) for i, (u, n) in enumerate(zip(unit, size, strict=True))]
        angle = 2 * torch.atan2((unit[0] - unit[1]).norm(dim=3), (unit[0] + unit[1]).norm(dim=3))
        shared = slerp(unit[0], unit[1], angle, self.t).to(dtype)
        form: Form = Plain(shared)
        if self.bits < 16:
            lines = lines_of(shared, "channels")
            form = Lines(Quantized.of(lines, self.bits, shared.shape[3]), shared.shape[1], "channels")
        most, least = angle.amax(2, keepdim=True), angle.amin(2, keepdim=True)
        apart = angle > most - self.gamma * (most - least)
        count = apart.sum(2, keepdim=True)
        m = int(count.max())
        at = apart.to(torch.uint8).sort(dim=2, descending=True, stable=True).indices[..., :m]
        shared_form = Shared(form, at.to(torch.int32) if m else None)
        halves = [Half(shared_form, n.to(dtype), None, heads) for n in size]
        if not m:
            return halves[0], halves[1]
        place = at[..., None].expand(-1, -1, -1, x[0].shape[3])
        there = (torch.arange(m, device=at.device) < count)[..., None]
        # Heads keep unequal numbers; the others' places hold what is read there anyway.
        kept = [
            torch.where(there, own.to(dtype).gather(2, place), half.restored().gather(2, place))
            for own, half in zip(x, halves, strict=True)
        ]
        return tuple(Half(shared_form, h.size, own, heads) for h, own in zip(halves, kept, strict=True))  # type: ignore[return-value]
