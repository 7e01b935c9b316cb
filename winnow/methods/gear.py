"""GEAR (arXiv:2403.05527): stores the cache as small integers, and repairs them with few outliers and a low-rank part.

Looks at: keys and values. Cost: a sort, and `loops` products with a thin matrix, for each block; r · N · D for each
head whenever the block is read.

Departs from the paper: prompt and buffer are compressed by blocks of `every` tokens throughout; scales and factors are
held in the model's own dtype (`precision` says otherwise).

Departs from the released code: that counts the outliers of a key's channel by the width of all heads, and not by the
number of tokens (`counted`); it makes bits² − 1 steps, which is right for 2 and 4 bits alone; a constant group becomes
NaN there; it rounds to fp16 whatever the model has, and saves no memory. Its random start is not seeded, and another
one for each sample; here it is one for all, drawn in the order in which that code draws.
"""

from collections.abc import Callable
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor

from winnow.contract import Action, CacheMethod, Codec, Count, KVView, Observe, Share, State, register
from winnow.parts.forms import Along, Both, Form, Lines, lines_of
from winnow.parts.quantize import Quantized
from winnow.parts.repair import Repaired, Spiked


@register("gear")
class Gear(CacheMethod):
    """Stores keys and values as integers, with few outliers and a low-rank matrix for what the integers miss.

    Args:
        bits: of an integer; 16 changes nothing.
        group: tokens of a key's channel, and channels of a value, that share a scale; 0: all (KCVT).
        sparsity: share of the entries of each channel (keys) or token (values) that are kept as outliers; 0 is GEAR-L.
        rank: of the low-rank part of each head's prompt; 0 for none.
        later_rank: the same of later blocks.
        loops: power iterations.
        every: tokens that wait, as they are, before they are compressed together; 0: those after the prompt stay.
        counted: what the outliers of a key's channel are a share of: its length in tokens, or the width of all heads;
            then the tokens of a last group that is not full are outliers as well, as in the released code.
        precision: of scales and factors: the model's, or fp32.
    """

    identity = {"bits": 16}
    released = {"counted": "width", "precision": "float"}

    bits: Literal[2, 3, 4, 8, 16] = 2
    group: Count = 64
    sparsity: Share = 0.02
    rank: Count = 4
    later_rank: Count = 2
    loops: Count = 3
    every: Count = 64
    counted: Literal["length", "width"] = "length"
    precision: Literal["model", "float"] = "model"

    def evict(self, view: KVView, state: State) -> tuple[Action, State]:
        if self.bits == 16:
            return Observe(), state
        first, later = (self.encoder(rank, view.seed * 1000 + view.layer) for rank in (self.rank, self.later_rank))
        return Codec(first, every=self.every, multiple=max(1, self.every), later=later), state

    def encoder(self, rank: int, seed: int) -> Callable[[Tensor, Tensor], Both]:
        """What makes a block of keys and values."""

        def encode(keys: Tensor, values: Tensor) -> Both:
            generator = torch.Generator().manual_seed(seed)
            k = self.stored(keys, "tokens", rank, generator)
            return Both(k, self.stored(values, "channels", rank, generator), keys.shape[2])

        return encode

    def stored(self, x: Float[Tensor, "b g n d"], along: Along, rank: int, generator: torch.Generator) -> Form:
        """One tensor as integers, outliers and factors."""
        lines, held = lines_of(x, along), torch.float32 if self.precision == "float" else x.dtype
        of = x.shape[1] * x.shape[3] if self.counted == "width" else lines.shape[2]
        each = min(int(of * self.sparsity / 2), lines.shape[2])
        short = lines.shape[2] % self.group if self.counted == "width" and self.group and along == "tokens" else 0
        if each:
            form: Form = Spiked.of(lines, each, self.bits, self.group, held, short)
        else:
            form = Quantized.of(lines, self.bits, self.group, held)
        whole = Lines(form, x.shape[1], along)
        _, g, n, d = x.shape
        start = torch.rand(g, d, rank, generator=generator)
        torch.rand(g, n, rank, generator=generator)  # the released code draws, and does not use, another side
        return Repaired.of(x, whole, start[..., : min(n, d)], self.loops, held) if rank else whole
