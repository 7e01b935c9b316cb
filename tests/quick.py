"""What the tests do thousands of times, and what of it need not be done again each time."""

from __future__ import annotations

import copy
import io
import pickle
from typing import Any

import torch
from torch import nn
from transformers import GenerationConfig, PreTrainedConfig


class Mould:
    """A model of which copies are made: as `copy.deepcopy` makes them, in a fifth of the time."""

    def __init__(self, model: nn.Module) -> None:
        self.model, self.tensors = model, []
        try:
            self.written = _written(model, self.tensors)
        except Exception:  # hooks that are functions of functions, and whatever else cannot be written
            self.written = None

    def copy(self) -> nn.Module:
        if self.written is None:
            return copy.deepcopy(self.model)
        reader, memo = _Reader(io.BytesIO(self.written)), {}
        reader.persistent_load = lambda place: copy.deepcopy(self.tensors[place], memo)
        return reader.load()


def copied(model: nn.Module) -> nn.Module:
    """As `copy.deepcopy`: faster, where the model can be written."""
    return Mould(model).copy()


def _written(model: nn.Module, tensors: list[torch.Tensor]) -> bytes:
    """Everything but the tensors, which are noted in order of appearance."""
    file = io.BytesIO()
    writer = _Writer(file, pickle.HIGHEST_PROTOCOL)
    writer.tensors = tensors
    writer.dump(model)
    return file.getvalue()


class _Writer(pickle.Pickler):
    tensors: list[torch.Tensor]

    def persistent_id(self, value: Any) -> int | None:
        if not isinstance(value, torch.Tensor):
            return None
        self.tensors.append(value)
        return len(self.tensors) - 1


class _Reader(pickle.Unpickler):
    """Its `persistent_load` is given to each."""


def remember_default_configurations() -> None:
    """`generate` makes the default configuration of a model's class at each call, to refuse settings of generation in
    that of the model. It finds the same whenever the same of them are set in the same class: what passed passes again.
    """
    plain, passed = PreTrainedConfig._get_generation_parameters, set()
    names = tuple(GenerationConfig._get_default_generation_params())

    def parameters(self: PreTrainedConfig) -> dict[str, Any]:
        key = type(self), *(name for name in names if getattr(self, name, None) is not None)
        if key in passed:
            return {}
        if not (found := plain(self)):
            passed.add(key)
        return found

    PreTrainedConfig._get_generation_parameters = parameters
