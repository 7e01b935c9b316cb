"""Prompts that hide a needle and ask for it, and what a language model attends to while it answers them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from winnow.core.errors import UnsupportedError
from winnow.parts.retrieval_heads import Trace

_ATTENTIONS = ("self_attn", "attention", "attn", "self_attention")
_OUTPUTS = ("o_proj", "out_proj", "dense", "c_proj", "wo")


@dataclass(frozen=True)
class Prompt:
    """Tokens, and where the needle among them starts and ends."""

    tokens: tuple[int, ...]
    needle: tuple[int, int]


def prompts(
    haystack: Sequence[int],
    needles: Sequence[tuple[Sequence[int], Sequence[int]]],
    lengths: Sequence[int],
    depths: Sequence[float],
) -> Iterator[Prompt]:
    """Each needle in a haystack of each length at each depth, and its question behind that.

    Args:
        haystack: tokens, at least as many as the largest length.
        needles: tokens of needles and of their questions.
        depths: 0 for the start, 1 for the end of the haystack.
    """
    for needle, question in needles:
        for length in lengths:
            for depth in depths:
                start = round(depth * length)
                tokens = (*haystack[:start], *needle, *haystack[start:length], *question)
                yield Prompt(tokens, (start, start + len(needle)))


@torch.no_grad()
def traces(
    model: Any, asked: Sequence[Prompt], window: int, steps: int = 50, ends: Sequence[int] = ()
) -> Iterator[Trace]:
    """What a language model of transformers writes behind prompts, token by token, and attends to meanwhile.

    Args:
        window: tokens at the end of the prompt whose attention is kept.
        steps: tokens that are written at most.
        ends: tokens that end an answer.

    Raises:
        UnsupportedError: its attention or its output projections are not found.
    """
    outputs = [_output(layer) for layer in model.get_decoder().layers]
    before = model.config._attn_implementation
    model.set_attn_implementation("eager")  # the others give no attention away
    try:
        for prompt in asked:
            yield _trace(model, prompt, window, steps, frozenset(ends), outputs)
    finally:
        model.set_attn_implementation(before)


def _trace(model: Any, prompt: Prompt, window: int, steps: int, ends: frozenset[int], outputs: list[Any]) -> Trace:
    ids = torch.tensor([prompt.tokens], device=model.device)
    n = ids.shape[1]
    window = min(window, n - 1)
    cache = model(input_ids=ids[:, :-window], use_cache=True).past_key_values
    out = model(input_ids=ids[:, -window:], past_key_values=cache, use_cache=True, output_attentions=True)
    read = [_checked(layer, x[0], n) for layer, x in enumerate(out.attentions)]
    written, rows = [], []
    latest = [x[:, -1] for x in read]
    for step in range(steps):
        token = int(out.logits[0, -1].argmax())
        if token in ends:
            break
        written.append(token)
        rows.append(latest)
        if step + 1 < steps:
            following = torch.tensor([[token]], device=ids.device)
            out = model(input_ids=following, past_key_values=cache, use_cache=True, output_attentions=True)
            latest = [x[0, :, -1] for x in out.attentions]
    values = [layer.values[0] for layer in cache.layers]

    def project(layer: int, heads: Tensor) -> Tensor:
        return outputs[layer](heads.to(outputs[layer].weight.dtype))

    return Trace(prompt.tokens, prompt.needle, written, read, rows, values, project)


def _checked(layer: int, attention: Tensor, n: int) -> Tensor:
    if attention.shape[2] != n:
        raise UnsupportedError(
            f"layer {layer} attends to {attention.shape[2]} of {n} tokens; heads are calibrated where every layer "
            "attends to everything before."
        )
    return attention


def _output(layer: Any) -> Any:
    for name in _ATTENTIONS:
        for inner in _OUTPUTS:
            found = getattr(getattr(layer, name, None), inner, None)
            if found is not None:
                return found
    raise UnsupportedError(
        f"the output projection of {type(layer).__name__} is not found; it is looked for as {', '.join(_OUTPUTS)} of "
        f"{', '.join(_ATTENTIONS)}."
    )
