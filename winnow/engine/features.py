"""What `mm_encoder_outputs` hold, in the containers that the classes expect: a list of items, or one tensor."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from winnow.core.errors import UnsupportedError
from winnow.engine.encoded_item import EncodedItem

POOLED, DEEP = "pooler_output", "deepstack_features"
OF_THE_TOWER = ("last_hidden_state", "hidden_states", "attentions")


def other_fields(output: Any) -> list[str]:
    """What a class puts beside the features for its own use, and what nobody else knows how to cut or to join."""
    return sorted(set(output) - {POOLED, DEEP, *OF_THE_TOWER})


def deep_layers(output: Any) -> list[Sequence[Tensor]]:
    """For each deepstack layer, the rows of each item."""
    return [_layer(entry) for entry in getattr(output, DEEP, None) or ()]


def _layer(entry: Any) -> Sequence[Tensor]:
    """Some classes write the number of the layer before its items."""
    return entry[1] if _numbered(entry) else entry


def _numbered(entry: Any) -> bool:
    return isinstance(entry, tuple) and len(entry) == 2 and isinstance(entry[0], int)


def by_item(features: Any, lengths: Sequence[int]) -> Sequence[Tensor]:
    """`[t, D]` the rows of each item, whatever the elements are in which an encoder gives them."""
    return torch.cat([x.reshape(-1, x.shape[-1]) for x in features]).split(list(lengths))


def shortened_features(output: Any, items: Sequence[EncodedItem], lengths: Sequence[int]) -> Any:
    """An encoder's output with what is left of its items, which come in the order of the prompt.

    Args:
        lengths: rows of each item before.
    """
    items = sorted(items, key=lambda item: item.number)
    given = by_item(output[POOLED], lengths)
    made = {POOLED: _like(output[POOLED], [i.features(x, i.rows) for i, x in zip(items, given, strict=True)])}
    layers = getattr(output, DEEP, None)
    if layers:
        made[DEEP] = type(layers)(_deep(entry, n, items, lengths) for n, entry in enumerate(layers))
    return type(output)(**{**output, **made})


def _deep(entry: Any, number: int, items: Sequence[EncodedItem], lengths: Sequence[int]) -> Any:
    layer = _layer(entry)
    given = by_item(layer, lengths)
    short = _like(layer, [i.features(given[i.number], i.deep[number]) for i in items])
    return (entry[0], short) if _numbered(entry) else short


def _like(given: Any, rows: list[Tensor]) -> Any:
    """Rows of items in the container of what was given.

    As a tensor each row is an item of its own, so that `generate` finds the boundaries of samples when it repeats them
    for beams.
    """
    if not isinstance(given, Tensor):
        return type(given)(rows)
    return torch.cat(rows) if given.ndim == 2 else torch.cat(rows)[:, None]


def joined_features(outputs: Sequence[Any]) -> Any:
    """The outputs of several requests as one."""
    first = outputs[0]
    if len(outputs) == 1:
        return first
    if found := other_fields(first):
        raise UnsupportedError(
            f"requests whose features come with {', '.join(found)} cannot be one batch; prepare them one by one."
        )
    made: dict[str, Any] = {POOLED: _together([output[POOLED] for output in outputs])}
    if getattr(first, DEEP, None):
        layers = [_together([deep_layers(output)[n] for output in outputs]) for n in range(len(first[DEEP]))]
        numbered = zip(first[DEEP], layers, strict=True)
        made[DEEP] = type(first[DEEP])((entry[0], own) if _numbered(entry) else own for entry, own in numbered)
    return type(first)(**made)


def _together(parts: Sequence[Any]) -> Any:
    if not isinstance(parts[0], Tensor):
        return type(parts[0])(x for part in parts for x in part)
    rows = torch.cat([part.reshape(-1, part.shape[-1]) for part in parts])
    return rows if parts[0].ndim == 2 else rows[:, None]
