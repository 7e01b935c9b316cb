"""Losses and gradients of a plan worked out by hand, for what trains a compressed model."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from typing import Any

import torch
import zoo
from byhand import Reference
from cases import ByHand
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

IGNORED = -100


def labelled(inputs: dict[str, Tensor]) -> Tensor:
    """Labels on text; none on pictures, on padding, and on the first token of a row, which nothing predicts."""
    mask = inputs["attention_mask"]
    hidden = (inputs["input_ids"] == zoo.IMAGE) | (mask == 0) | (mask.cumsum(1) == 1)
    return inputs["input_ids"].masked_fill(hidden, IGNORED)


def losses_by_hand(reference: Reference, part: dict[str, Tensor], by_hand: ByHand, labels: Tensor) -> list[Tensor]:
    """A loss for each label of one sample, with gradients: the last row in front of a label's position predicts it."""
    entry = inspect.unwrap(Reference.entry)(reference, part)
    worked = by_hand(reference, part, entry)
    trace = inspect.unwrap(Reference.run)(reference, worked.entry, (), worked.cuts)
    held = trace.layers[-1].held
    logits = reference.model.lm_head(trace.hidden[0])
    found = []
    for position, label in enumerate(labels.tolist()):
        if label != IGNORED:
            row = int((held < position).nonzero()[-1])
            found.append(cross_entropy(logits[row], torch.tensor(label)))
    return found


def batch_by_hand(reference: Reference, parts: Sequence[dict[str, Tensor]], by_hand: ByHand) -> list[Tensor]:
    """The losses of all samples, labelled on text."""
    return [loss for part in parts for loss in losses_by_hand(reference, part, by_hand, labelled(part)[0])]


def learning(model: nn.Module) -> Reference:
    """A reference that runs this very model, so that gradients reach its weights."""
    reference = Reference(model)
    reference.model, reference.lm = model, model.model.language_model
    return reference


def gradients(model: Any) -> dict[str, Tensor]:
    """What each parameter got."""
    return {name: weight.grad.clone() for name, weight in model.named_parameters() if weight.grad is not None}


def checkpointed(model: Any, reentrant: bool = False) -> Any:
    """The same model in training mode, its layers run again in the backward pass."""
    model.train()
    enable = getattr(model, "activation_checkpointing_enable", model.gradient_checkpointing_enable)  # the name of 5.23
    enable({"use_reentrant": reentrant})
    return model
