"""Prompts that came as embeddings with the pictures in them already: where the pictures stand is the caller's word."""

from typing import Any

import torch
from torch import Tensor

from winnow.core.errors import UnsupportedError, WinnowError
from winnow.core.layout import Layout
from winnow.engine.encoding import EncoderRecord
from winnow.engine.item_tokens import Span, find_spans
from winnow.engine.request import Request


def checked_placeholders(given: Any) -> Tensor | None:
    """The caller's mask of picture rows, `[B, S]` of booleans."""
    if given is None:
        return None
    if not isinstance(given, Tensor) or given.ndim != 2 or given.dtype != torch.bool or not bool(given.any()):
        got = f"{tuple(given.shape)} of {given.dtype}" if isinstance(given, Tensor) else type(given).__name__
        raise WinnowError(
            f"placeholders: got {got}; give a (batch, tokens) tensor of booleans, True where inputs_embeds hold a "
            "picture's rows."
        )
    return given.cpu()


def merged_items(request: Request) -> tuple[list[tuple[Span, EncoderRecord]], list[int], Tensor] | None:
    """The items of a prompt that came as embeddings, where they end in each row, and `[B, S]` 1 for their tokens.

    Each unbroken run of placeholders is an item. None where the caller did not say where they are, or came with ids.
    """
    mask, embeds = request.placeholders, request.called.get("inputs_embeds")
    if mask is None or embeds is None:
        return None
    repeats, rest = divmod(embeds.shape[0], mask.shape[0])
    if rest or embeds.shape[1] != mask.shape[1]:
        raise WinnowError(f"placeholders: {tuple(mask.shape)} for inputs_embeds of {tuple(embeds.shape[:2])} tokens.")
    if request.plan.features:
        raise UnsupportedError(
            f"{request.plan.plan} acts before the projector, and inputs_embeds are behind it; use a method that acts "
            "at projected or in a layer, or give the pixels."
        )
    modality = next(iter(request.bound.token_ids), "image")
    idle = [m.slug for number, m in enumerate(request.plan.plan.methods) if not request.plan.acts_on(number, modality)]
    if idle:
        raise UnsupportedError(
            f"placeholders: what they say is taken for items of the kind {modality}, on which {', '.join(idle)} "
            f"does not act in {request.bound.info.model}; give input_ids and what its processor makes of the items."
        )
    lengths = tuple(length for row in mask for length in _runs(row))
    record = EncoderRecord(modality, {}, lengths, plan=request.plan, layouts=tuple(map(Layout.sequence, lengths)))
    ids = mask.long().repeat_interleave(repeats, 0)
    spans, ends = find_spans(ids, 1, lengths, modality)
    return [(span, record) for span in spans], ends, ids


def _runs(row: Tensor) -> list[int]:
    at = row.nonzero()[:, 0]
    return [len(run) for run in at.tensor_split((at.diff() > 1).nonzero()[:, 0] + 1) if len(run)]
