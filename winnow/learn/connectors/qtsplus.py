"""QTSplus: what scores, what counts and what re-encodes, on the answers through a gate that draws what is kept.

Departs from the authors' training: they price the share that is kept. Tokens that were not drawn have no gradient, and
here that alone draws the share down: at a tenth of their prices it falls to the least that is allowed within 400 steps.
So what costs is the distance of the mean share from a target, and questions and clips differ about it. The scores, the
norms and the attention of blocks begin as those of a layer of the frozen language model, which already looks for what
is alike; what follows attention begins at nothing.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

from winnow.core.view import View
from winnow.learn.connectors import recipe
from winnow.learn.connectors.output import Output
from winnow.parts.counted_gate import gate, standard
from winnow.parts.finite import finite

TAU = 0.5  # of the gate, on standardised scores
TARGET = 0.25  # the mean share of tokens that are kept
PRICE, SMOOTH = 10.0, 0.05  # of the squared distance from it, and of that of shares from their mean
LAYER = 0  # of the language model, which the module begins as


class Recipe(recipe.Recipe):
    slug = "qtsplus"
    steps, rate = 400, 5e-4
    also = ({"keep": 9},)

    def start(self, module: Any) -> None:
        layer: Any = self.frozen.model.model.language_model.layers[LAYER]
        with torch.no_grad():
            begin(module, layer, self.frozen.model.config.get_text_config())

    def output(self, module: nn.Module, view: View) -> Output:
        return self.drawn(view) if module.training else super().output(module, view)

    def drawn(self, view: View) -> Output:
        """What is kept by a draw of the gate, with its gradient, and the price of how much it is."""
        method: Any = self.method
        x, there = finite(view.tokens)
        r = method.scores(view, x, there)
        share = method.shares(view, r)
        noise = torch.rand(r.shape, generator=self.generator).clamp(1e-6, 1 - 1e-6).logit()
        drawn = gate(standard(r), share * view.n, TAU, noise)
        kept = [chosen(lane, own) for lane, own in zip(drawn, r, strict=True)]
        tokens = method.encoded(view, x * drawn[..., None], kept)
        rows = [torch.ones_like(own, dtype=torch.bool) for own in kept]
        at, real = (pad_sequence(own, batch_first=True) for own in (kept, rows))
        return Output(tokens, at, real, priced(share))


def priced(share: Tensor) -> dict[str, Tensor]:
    """What the shares of a step cost."""
    mean = share.mean()
    return {"target": PRICE * (mean - TARGET) ** 2, "smooth": SMOOTH * (share - mean.detach()).square().mean()}


def chosen(drawn: Tensor, r: Tensor) -> Tensor:
    """The tokens that were drawn, or the best one where none was."""
    kept = (drawn.detach() > 0.5).nonzero()[:, 0]
    return kept if len(kept) else r.argmax()[None]


def begin(module: Any, layer: Any, config: Any) -> None:
    """Scores and attention as in a layer of the language model; what follows attention adds nothing yet."""
    attention, norms = layer.self_attn, (layer.input_layernorm, layer.post_attention_layernorm)
    shared = config.num_attention_heads // config.num_key_value_heads
    head = module.scorer.q.out_features // module.scorer.heads

    def spread(x: Tensor) -> Tensor:
        """A projection to fewer heads, for all that share one."""
        return x.unflatten(0, (-1, head)).repeat_interleave(shared, 0).flatten(0, 1)

    keys = {name: spread(x) for name, x in attention.k_proj.named_parameters()}
    values = {name: spread(x) for name, x in attention.v_proj.named_parameters()}
    queries = dict(attention.q_proj.named_parameters())
    module.scorer.q.load_state_dict(queries)
    module.scorer.k.load_state_dict(keys)
    for norm in module.scorer.norms:
        norm.weight.copy_(norms[0].weight)
    for block in module.blocks:
        for own, given in zip(block.norms, norms, strict=True):
            own.weight.copy_(given.weight)
        block.qkv.load_state_dict({name: torch.cat([queries[name], keys[name], values[name]]) for name in queries})
        block.out.weight.copy_(attention.o_proj.weight)
        block.down.weight.zero_()
