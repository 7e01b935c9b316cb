"""How much each token of a video differs from the token at its place in the frame before."""

import torch
from jaxtyping import Float
from torch.nn.functional import cosine_similarity

from winnow.core.view import View
from winnow.parts.frames import clip_of

NEW, FIRST = 2.0, 255.0  # no later token differs more than by 2
GOLDEN = 0.6180339887498949


def changed(view: View) -> Float[torch.Tensor, "b n"]:
    """1 − cosine with the frame before, at least in fp32; of a token behind a place that is empty or broken, 2.

    Tokens of the first frame come before all others, in an order whose start is even over the frame. A broken token has
    NaN.
    """
    clip = clip_of(view)
    x = clip.tokens.to(torch.promote_types(clip.tokens.dtype, torch.float32))
    broken = ~x.sum(-1).isfinite()
    change = 1 - cosine_similarity(x[:, 1:], x[:, :-1], dim=-1)
    change = change.masked_fill(broken[:, :-1] | ~clip.there[:, :-1], NEW)
    spread = torch.arange(x.shape[2], device=x.device, dtype=torch.float64) * GOLDEN % 1  # its start is even
    first = (FIRST - spread).to(change.dtype).expand(view.b, 1, -1)
    return clip.of_tokens(torch.cat([first, change], 1).masked_fill(broken, torch.nan))
