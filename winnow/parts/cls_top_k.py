"""The patches of a spectrogram that [CLS] attends to (arXiv 2504.01690), for transformers of audio without an LM.

The Audio Spectrogram Transformer has two tokens before its patches, [CLS] and one of distillation; both always stay. It
classifies, and no class of transformers has it in front of a language model, so this is a part and no method.
"""

from fractions import Fraction

import torch
from jaxtyping import Float
from torch import Tensor

from winnow.core.budget import round_share
from winnow.core.errors import WinnowError
from winnow.core.reduction import Reduction
from winnow.core.select import top_k

AFTER = (3, 6, 9)  # blocks of twelve, from 0, behind which patches leave


def cls_top_k(attention: Float[Tensor, "b h n n"], rate: float, prefix: int = 2) -> Reduction:
    """The tokens that stay behind a block: those before the patches, and the best of these, in their order.

    The authors' code leaves patches in the order of their scores. Positions have been added by then, so that the order
    changes nothing but the order.

    Args:
        attention: of the block, over the tokens that are there.
        rate: share of the patches that are there; a part of a token counts as one.
        prefix: tokens before the patches, [CLS] first.
    """
    patches = attention.shape[-1] - prefix
    if not 0 < rate <= 1 or prefix < 1 or patches < 1:
        raise WinnowError(
            f"cls_top_k: rate={rate}, prefix={prefix}, {patches} patches; allowed: a rate above 0 and up to 1, "
            "at least [CLS] before the patches, and at least one of these."
        )
    row = attention[:, :, 0, prefix:].to(torch.promote_types(attention.dtype, torch.float32)).mean(1)
    chosen = top_k(row, round_share(Fraction(repr(rate)) * patches, "ceil")).representatives
    always = torch.arange(prefix, device=row.device).expand(row.shape[0], -1)
    return Reduction.select(torch.cat([always, chosen + prefix], 1), prefix + patches)


def annealed(rate: float, epoch: int, first: int = 5, epochs: int = 15) -> float:
    """The rate of an epoch of fine-tuning: 1 up to `first`, then down to the target in equal steps over `epochs`."""
    done = min(1.0, max(0.0, (epoch - first) / epochs))
    return 1 - done * (1 - rate)
