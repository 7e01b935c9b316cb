"""How much each visual token explains an answer: attention and its gradients, rolled out over all layers.

The rules of generic attention explainability (Chefer et al.): with Ā the mean over heads of the positive part of
attention times its gradient, R ← R + Ā · R, layer by layer from the identity. A row of R is what a token stands on.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from winnow.core.errors import UnsupportedError


def relevance(model: Any, visual: Int[Tensor, " v"], forward: Callable[[], Any]) -> Float[Tensor, " v"]:
    """The relevance of visual tokens for the first token of the answer that the model gives; it sums to one.

    Args:
        model: with eager attention, which shows its weights.
        visual: where the tokens stand in the one row of the prompt.
        forward: calls the model on it, with `output_attentions=True`.
    """
    with torch.enable_grad(), _from_embeddings(model):
        output = forward()
        if not output.attentions:
            raise UnsupportedError("the model shows no attention weights; load it with attn_implementation='eager'.")
        gradients = torch.autograd.grad(output.logits[0, -1].max(), output.attentions)
    row = rollout([a[0].detach() for a in output.attentions], [g[0] for g in gradients])
    found = row[visual].clamp_min(0)
    return found / found.sum().clamp_min(torch.finfo(found.dtype).tiny)


def rollout(attention: Sequence[Float[Tensor, "h n n"]], gradients: Sequence[Float[Tensor, "h n n"]]) -> Tensor:
    """`[N]` the last row of R, which needs no product of matrices."""
    row = torch.zeros(attention[0].shape[-1], device=attention[0].device)
    row[-1] = 1
    for a, g in zip(reversed(attention), reversed(gradients), strict=True):
        row = row + row @ (a.float() * g.float()).clamp_min(0).mean(0)
    return row


def rollout_naive(attention: Sequence[Tensor], gradients: Sequence[Tensor]) -> Tensor:
    """The last row of R as the rules say it."""
    n = attention[0].shape[-1]
    whole = torch.eye(n)
    for a, g in zip(attention, gradients, strict=True):
        whole = whole + (a * g).clamp_min(0).mean(0) @ whole
    return whole[-1]


@contextmanager
def _from_embeddings(model: Any) -> Iterator[None]:
    """A frozen model makes a graph from its embeddings on."""
    handle = model.get_input_embeddings().register_forward_hook(lambda module, args, out: out.detach().requires_grad_())
    try:
        yield
    finally:
        handle.remove()
