"""The learned parts of a tokenizer that knows the question (QTSplus): scores, a share to keep, and re-encoding."""

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn.functional import gelu, scaled_dot_product_attention


class Scorer(nn.Module):
    """The most that any head of any token of the question attends to each token."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads, inner = heads, heads * (width // heads)
        self.norms = nn.ModuleList(nn.RMSNorm(width, 1e-6) for _ in range(2))
        self.q, self.k = nn.Linear(width, inner), nn.Linear(width, inner)

    def forward(self, text: Tensor, x: Tensor, there: Tensor) -> Float[Tensor, "b n"]:
        q, k = self.q(self.norms[0](text)), self.k(self.norms[1](x))
        q, k = (part.unflatten(-1, (self.heads, -1)).transpose(1, 2) for part in (q, k))
        logits = q @ k.mT * q.shape[-1] ** -0.5
        return logits.masked_fill(~there[:, None, None], -torch.inf).softmax(-1).nan_to_num(0).amax((1, 2))


class Share(nn.Module):
    """A logit of the share of tokens that stay."""

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(width + 3, hidden), nn.Linear(hidden, 1)

    def forward(self, text: Tensor, r: Tensor) -> Float[Tensor, " b"]:
        p = r / r.sum(1, keepdim=True).clamp_min(1e-12)
        entropy = -(p * p.clamp_min(1e-12).log()).sum(1)
        size = torch.full_like(entropy, r.shape[1]).log()
        known = torch.cat([text.mean(1), torch.stack([size, r.amax(1), entropy], 1)], 1)
        return self.down(gelu(self.up(known)))[:, 0]


class Block(nn.Module):
    """A layer of self-attention in which every token sees every other and when it was."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads, inner = heads, heads * (width // heads)
        self.norms = nn.ModuleList(nn.RMSNorm(width, 1e-6) for _ in range(2))
        self.qkv, self.out = nn.Linear(width, 3 * inner), nn.Linear(inner, width, bias=False)
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x: Float[Tensor, "b n d"], time: Float[Tensor, "b n d"]) -> Float[Tensor, "b n d"]:
        q, k, v = self.qkv(self.norms[0](x) + time).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        x = x + self.out(scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))
        return x + self.down(gelu(self.up(self.norms[1](x))))


class Tokenizer(nn.Module):
    """What scores, what counts, and blocks that re-encode what is kept."""

    def __init__(self, width: int, heads: int, hidden: int, blocks: int) -> None:
        super().__init__()
        self.scorer, self.share = Scorer(width, heads), Share(width, hidden)
        self.blocks = nn.ModuleList(Block(width, heads) for _ in range(blocks))

    def forward(self, x: Float[Tensor, "b n d"], time: Float[Tensor, "b n d"]) -> Float[Tensor, "b n d"]:
        for block in self.blocks:
            x = block(x, time)
        return x
