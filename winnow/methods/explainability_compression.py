"""Explainability compression (arXiv 2506.01097): a tiny convolutional net guesses which tokens explain the answer.

Looks at: what the question attends to in the first LM layer, head by head, which is probed before that layer runs.
Cost: the keys of one layer, O(S · D²), the question's rows, and O(V · 64² · 9) for the net.

The net is trained with the model frozen: its target is how much each visual token explains the answer, by attention
and its gradients through all layers (see `winnow.learn.pruners`). Each picture, crop mosaic and frame is a plane of
its own; at its edges the nearest token is repeated.
Departs from the paper: sizes and loss of the net are choices of ours; attention is taken times the number of tokens,
and its logarithm, so that pictures of any size look alike to the net.
Departs from the released code: no code has been released.
"""

import math
from dataclasses import dataclass
from typing import Literal, Self

import torch
from jaxtyping import Float
from torch import nn

import winnow.contract as wn
from winnow.parts.learned import in_fp32, learned
from winnow.parts.planes import planes

CHANNELS = 64


@dataclass(frozen=True)
class HeadsOfQuestion(wn.LMSignal):
    """Attention from the question to the item's tokens in each head of an LM layer, mean over rows: `[b, N, H]`, fp32.

    Args:
        layer: the LM layer.
        heads: H; known once the signal is resolved.
    """

    heads: int = 1

    @property
    def reads_question(self) -> bool:
        return True

    @property
    def queries(self) -> Literal["question"]:
        return "question"

    def resolve(self, info: wn.ModelInfo) -> Self:
        return super().resolve(info)._with(heads=info.heads)

    def read(self, seen: wn.LMAttentionInputs) -> Float[torch.Tensor, "b p h"]:
        return seen.received_by_head()

    def sample(self, generator: torch.Generator, b: int, n: int) -> torch.Tensor:
        return torch.randn(b, n, self.heads, generator=generator).mul(2).softmax(1)


class Net(nn.Sequential):
    """Two convolutions of 3 × 3 and one of 1 × 1: planes of any size to a score for each place."""

    def __init__(self, heads: int, channels: int) -> None:
        wide = {"kernel_size": 3, "padding": 1, "padding_mode": "replicate"}
        first, second = nn.Conv2d(heads, channels, **wide), nn.Conv2d(channels, channels, **wide)  # type: ignore[arg-type]
        super().__init__(first, nn.GELU(), second, nn.GELU(), nn.Conv2d(channels, 1, 1))


@wn.register("explainability-compression")
class ExplainabilityCompression(wn.Method):
    """Keep the tokens that a tiny net, which sees the first layer's attention, takes for the grounds of the answer.

    Args:
        keep: content tokens of the item.
        weights: a file that `winnow train explainability-compression` wrote, or `untrained`; default: those for the
            reference model.
    """

    keep: wn.Budget = wn.Budget("50%")
    weights: str | None = None

    def build(self, info: wn.ModelInfo):
        def make(channels: int = CHANNELS) -> Net:
            return Net(info.heads, channels)

        return learned(self.slug, self.weights, info, make)

    def signals(self):
        return (HeadsOfQuestion(0),)

    def score(self, view: wn.View):
        seen = view[self.signals()[0]]  # b n h
        broken = ~seen.isfinite().all(-1)
        seen = seen.masked_fill(broken[..., None], 0)
        whole = seen.new_zeros(view.b, view.layout.n_content + 1, seen.shape[-1])
        whole.scatter_(1, view.ids[..., None].expand_as(seen), seen)
        scores = torch.stack([self._scored(view, item) for item in whole])
        return scores.gather(1, view.ids).masked_fill(broken, torch.nan)

    def _scored(self, view: wn.View, item: Float[torch.Tensor, "w h"]) -> Float[torch.Tensor, " w"]:
        """The score of each content token of one item, by its attention; absent ones have none."""
        scores = item.new_zeros(item.shape[0], dtype=torch.promote_types(item.dtype, torch.float32))
        for plane in planes(view.layout, item.device):
            shown = shown_to_net(item[plane].permute(0, 3, 1, 2), view.layout.n_content)
            scores[plane] = in_fp32(view.module, shown)[:, 0].to(scores)
        return scores


def shown_to_net(attention: torch.Tensor, n: int) -> torch.Tensor:
    """Attention as the net is given it: relative to that of n tokens that share it equally."""
    wide = attention.to(torch.promote_types(attention.dtype, torch.float32))
    return torch.log1p(wide * n) / math.log(2)
