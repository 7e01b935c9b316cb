"""How the recall model begins: not all at random, so that looking things up is learned in minutes.

A model that looks up what followed a word has early heads that write into each token what stood just before it. To form
them from random weights takes most of a training; here the first layer begins with them. Everything stays trainable.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from transformers import LlamaForCausalLM

BACK = (1, 2)  # how far back the heads of the first groups look
SAME = 0.1  # a channel that is the same in all embeddings, next to others of about 0.02
FAST = 6  # turns that tell neighbours apart
BACK_GAIN = 1.5  # of queries and keys that read nothing but places
MATCH_GAIN = 3.0  # of queries and keys that start equal, so that a token attends to what is like it


@torch.no_grad()
def begin(model: LlamaForCausalLM) -> None:
    """Set queries and keys of a fresh model."""
    for layer in model.model.layers:
        queries, keys = _by_group(layer.self_attn)
        queries.mul_(MATCH_GAIN)
        keys.copy_(queries[:, 0])
    model.model.embed_tokens.weight[:, 0] = SAME
    queries, keys = _by_group(model.model.layers[0].self_attn)
    for group, back in zip(range(len(keys)), BACK, strict=False):
        _look_back(queries[group], keys[group], model.model.rotary_emb.inv_freq, back)


def _by_group(attention: nn.Module) -> tuple[Tensor, Tensor]:
    """Views of the weights of queries `[G, H / G, d, D]` and keys `[G, d, D]`."""
    queries, keys, width = attention.q_proj.weight, attention.k_proj.weight, attention.head_dim
    groups = keys.shape[0] // width
    return queries.view(groups, -1, width, queries.shape[-1]), keys.view(groups, width, keys.shape[-1])


def _look_back(queries: Tensor, keys: Tensor, turns: Tensor, back: int) -> None:
    """Let the heads of a group attend to the token `back` places before, whatever it is.

    Queries and keys read only the channel that is the same in all embeddings, and differ by a turn of `back` places.
    """
    fast = turns[:FAST]
    places = torch.arange(len(fast))
    keys.zero_()
    queries.zero_()
    keys[torch.cat([places, places + len(turns)]), 0] = BACK_GAIN * torch.cat(
        [(fast * back).cos(), (fast * back).sin()]
    )
    queries[:, : len(fast), 0] = BACK_GAIN
