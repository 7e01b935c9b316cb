"""KV-Quantized (arXiv:2402.02750): stores the cache as small integers, keys by channel and values by token, as KIVI.

Looks at: keys and values. Cost: one pass over a block when it is stored, and one whenever it is read.

Departs from the paper: the newest tokens wait in a buffer that is emptied as a whole when it is full, for keys and for
values; KIVI's holds 128, and lets values go one by one.
"""

from typing import Literal

from torch import Tensor

from winnow.contract import Action, CacheMethod, Codec, Count, KVView, Observe, State, register
from winnow.parts.forms import Both, Lines, lines_of
from winnow.parts.quantize import Float8, Quantized


@register("kv-quantized")
class KVQuantized(CacheMethod):
    """Stores keys and values as small integers, or in fp8.

    Args:
        bits: of an integer; fp8 is a cast to e4m3 without scales; 16 changes nothing.
        group: tokens of a key's channel, and channels of a value, that share a scale; 0: all.
        every: tokens that wait, stored as they are, before they are quantised; 0: those after the prompt stay.
    """

    identity = {"bits": 16}

    bits: Literal[16, 8, 4, 3, 2, "fp8"] = 4
    group: Count = 64
    every: Count = 64

    def evict(self, view: KVView, state: State) -> tuple[Action, State]:
        if self.bits == 16:
            return Observe(), state
        return Codec(self.encode, every=self.every, multiple=max(1, self.every)), state

    def encode(self, keys: Tensor, values: Tensor) -> Both:
        """A block."""
        if self.bits == "fp8":
            return Both(Float8.of(keys), Float8.of(values), keys.shape[2])
        k, v = (
            Lines(Quantized.of(lines_of(x, along), self.bits, self.group), x.shape[1], along)  # type: ignore[arg-type]
            for x, along in ((keys, "tokens"), (values, "channels"))
        )
        return Both(k, v, keys.shape[2])
