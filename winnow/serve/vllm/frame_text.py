"""Text between the frames of a video (times, numbers, marks), embedded on the worker with the tokens that stay.

How much of it stands before a kept token is known behind the encoder alone, so all of the video are placeholders in the
prompt, and the rows that come for them hold the text as well.
"""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from winnow.serve.vllm.order import Order
from winnow.serve.vllm.subject import Shortened

PLACEHOLDER = -1  # no token has this id


def whole_of(order: Order, token: int) -> list[int]:
    """The token ids of an item as they are uncompressed, with the text of its frames where that travels with them."""
    if not order.marks:
        return [token] * sum(order.runs)
    found = list(order.marks[0])
    for run, mark in zip(order.runs, order.marks[1:], strict=True):
        found += [token] * run + list(mark)
    return found


def in_text(own: Shortened, order: Order, model: Any) -> tuple[Float[Tensor, "m d"], Int[Tensor, " m"]]:
    """The rows of a video with the text of its frames, and the token of the whole whose position each has.

    Args:
        model: of vLLM, whose language model embeds the text.
    """
    if not order.marks:
        return own.rows, own.places
    device, width = own.rows.device, own.rows.shape[1]
    ids = torch.tensor(whole_of(order, PLACEHOLDER), device=device)
    text, token = (ids != PLACEHOLDER).nonzero()[:, 0], (ids == PLACEHOLDER).nonzero()[:, 0]
    words = model.get_language_model().embed_input_ids(ids[text]).to(own.rows.dtype)
    words = torch.nn.functional.pad(words, (0, width - words.shape[1]))  # deepstack adds nothing to text
    at = torch.cat([text, token[own.slots]]).argsort()
    return torch.cat([words, own.rows])[at], torch.cat([text, token[own.places]])[at]
