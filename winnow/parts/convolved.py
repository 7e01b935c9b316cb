"""Mixtures of the slots of a cache, by a convolution over their keys and values that is trained."""

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from winnow.core.kv_select import top_slots
from winnow.core.select import comparable
from winnow.parts.learned import in_fp32

SHARPNESS = 3.0  # of logits: a mixture begins with few slots
NEAR_ONE = 3.0  # α begins at sigmoid(3) = 0.95


class Mixer(nn.Module):
    """Logits of each mixture for each slot, and α, the share of what they say: one for all KV heads of a layer."""

    def __init__(self, channels: int, mixtures: int, kernel: int) -> None:
        super().__init__()
        self.conv = nn.Conv1d(channels, mixtures, kernel, padding="same")
        self.alpha_bias = nn.Parameter(torch.zeros(()))

    def forward(self, x: Float[Tensor, "g c n"]) -> Float[Tensor, "g m n"]:
        return SHARPNESS * self.conv(x).relu()

    @property
    def alpha(self) -> Tensor:
        return (NEAR_ONE + self.alpha_bias.float()).sigmoid()


def mixtures(
    mixer: Mixer,
    alpha: float | None,
    keys: Float[Tensor, "b g n d"],
    values: Float[Tensor, "b g n d"],
    scores: Float[Tensor, "b g n"],
    chosen: Int[Tensor, "b g k"],
    heavy: int,
) -> Float[Tensor, "b g k n"]:
    """Weights of all slots in each output, which are at least 0 and sum to 1.

    A mixture is (1 − α) of its own slot and α of the softmax of its logits over all slots but the whole ones; a slot
    with a broken key or value has no weight there.

    Args:
        alpha: in the place of the mixer's own.
        scores: of all slots.
        chosen: ascending slots, one for each output.
        heavy: the best of them, so many, stay as they are; the first of the others is that of the first mixture.
    """
    b, g, n = keys.shape[:3]
    best = comparable(scores.gather(2, chosen).flatten(0, 1)).view_as(chosen)
    whole = chosen.gather(2, top_slots(best, heavy))
    taken = torch.zeros(b, g, n, dtype=torch.bool, device=keys.device).scatter(2, whole, True)
    others = (~taken).nonzero()[:, 2].view(b, g, -1)
    x = torch.cat([keys, values], 3)
    broken = ~x.isfinite().all(3)
    x = x.masked_fill(broken[..., None], 0).gather(2, others[..., None].expand(-1, -1, -1, x.shape[3])).mT
    count = chosen.shape[2] - whole.shape[2]
    logits = torch.stack(
        [in_fp32(mixer, own)[:, :count] for own in x]
    )  # one by one: a batch is its samples, bit by bit
    logits = logits.masked_fill(broken.gather(2, others)[:, :, None], torch.finfo(logits.dtype).min)
    share = mixer.alpha if alpha is None else logits.new_tensor(alpha)
    outputs = (~taken.gather(2, chosen)).nonzero()[:, 2].view(b, g, count, 1).expand(-1, -1, -1, n)
    own = torch.zeros(*chosen.shape, n, device=x.device).scatter(3, chosen[..., None], 1)
    learned = torch.zeros(b, g, count, n, device=x.device).scatter(
        3, others[:, :, None].expand_as(logits), logits.softmax(3)
    )
    return own.scatter(2, outputs, (1 - share) * own.gather(2, outputs) + share * learned)
