"""The most attention that a token gets in a layer of the language model."""

from dataclasses import dataclass

import torch
from jaxtyping import Float

from winnow.signals.language import LMAttentionInputs, LMSignal
from winnow.signals.words import text_of


@dataclass(frozen=True)
class TextPeak(LMSignal):
    """The most that any head of any text token behind the last item attends to each token of it: `[b, N]`, fp32.

    Args:
        layer: the LM layer whose attention is read.
    """

    def read(self, seen: LMAttentionInputs) -> Float[torch.Tensor, "b p"]:
        slots, real = text_of(seen.packing, seen.spans, "all")
        wide = torch.promote_types(seen.q.dtype, torch.float32)
        found = torch.zeros(len(slots), seen.packing.width, dtype=wide, device=seen.q.device)
        for b, own in enumerate(slots):
            for at, weights in seen.by_head(b, own):
                live = real[b, : own.shape[0]][at, None]
                rows = weights[..., seen.before :].masked_fill(~live, 0)
                found[b] = torch.maximum(found[b], rows.amax((0, 1)))
        return found
