"""How the recall model begins: with looking things up roughly in place, instead of at random.

A model that has learned to look up what followed a word has early heads that write into each token what stood just
before it, and later heads that compare that with the last words of the text. To form them from random weights takes
most of a training, and until then answers are any value of the text; begun like this, the look-up only has to be
sharpened. Everything stays trainable.
"""

from __future__ import annotations

import torch
from torch import Tensor
from transformers import LlamaForCausalLM

BACK = (1, 2, 3)  # how far back the first groups of heads of the first layer look
SAME = 0.1  # a channel that is the same in all embeddings, next to others of EMBEDDED
EMBEDDED = 0.02
FAST = 6  # turns that tell neighbours apart
SLOW = 7  # from this one on, turns that hardly move over a context
BACK_GAIN = 1.5  # of queries and keys that read nothing but places
WRITE_GAIN = 0.07  # with which each head of a group writes
MATCH_GAIN = 1.1  # of queries and keys that compare what was written
COPY_GAIN = 0.25


class Groups:
    """Views of the weights of one attention, by group of heads that share keys and values."""

    def __init__(self, model: LlamaForCausalLM, layer: int) -> None:
        attention, sizes = model.model.layers[layer].self_attn, model.config
        groups, hidden = sizes.num_key_value_heads, sizes.hidden_size
        width = hidden // sizes.num_attention_heads
        self.queries = attention.q_proj.weight.view(groups, -1, width, hidden)
        self.keys = attention.k_proj.weight.view(groups, width, hidden)
        self.values = attention.v_proj.weight.view(groups, width, hidden)
        self.out = attention.o_proj.weight.view(hidden, groups, -1, width)


@torch.no_grad()
def begin(model: LlamaForCausalLM) -> None:
    """Set the first two layers of a fresh model."""
    turns = model.model.rotary_emb.inv_freq
    first, second = Groups(model, 0), Groups(model, 1)
    used = min(len(BACK), len(first.keys))
    slow = torch.arange(min(SLOW, len(turns) // 2), len(turns))
    slow = torch.cat([slow, slow + len(turns)])
    model.model.embed_tokens.weight[:, 0] = SAME
    names, *written = _directions(model.config.hidden_size, len(slow), 1 + used)
    copied = _directions(model.config.hidden_size, 2 * len(turns), used)
    for group, back in zip(range(used), BACK, strict=False):
        _look_back(first.queries[group], first.keys[group], turns, back)
        first.values[group, slow] = names
        first.out[:, group] = 0
        first.out[:, group, :, slow] = WRITE_GAIN * written[group].t()[:, None]
    # The last word is what stands one back from what followed it, the word before that stands two back, and so on.
    shared = first.queries.shape[1]
    asked = [names * (shared * WRITE_GAIN / EMBEDDED), *written]
    for group in range(used):
        second.queries[group] = 0
        second.keys[group] = 0
        second.queries[group][:, slow] = MATCH_GAIN * asked[group]
        second.keys[group, slow] = MATCH_GAIN * written[group]
        second.values[group] = copied[group]
        second.out[:, group] = COPY_GAIN * copied[group].t()[:, None]


def _look_back(queries: Tensor, keys: Tensor, turns: Tensor, back: int) -> None:
    """Let the heads of a group attend to the token `back` places before, whatever it is.

    Queries and keys read only the channel that is the same in all embeddings, and differ by a turn of `back` places.
    """
    fast, half = turns[:FAST], len(turns)
    keys.zero_()
    queries.zero_()
    keys[: len(fast), 0] = BACK_GAIN * (fast * back).cos()
    keys[half : half + len(fast), 0] = BACK_GAIN * (fast * back).sin()
    queries[:, : len(fast), 0] = BACK_GAIN


def _directions(hidden: int, rows: int, count: int) -> list[Tensor]:
    """`count` matrices [rows, hidden] of rows of length 1, at right angles where there is room for all.

    They leave out the first channel, which is the same in all embeddings.
    """
    whole = -(-rows * count // (hidden - 1))
    found = torch.cat([torch.linalg.qr(torch.randn(hidden - 1, hidden - 1))[0] for _ in range(whole)])
    return list(torch.nn.functional.pad(found[: rows * count], (1, 0)).split(rows))
