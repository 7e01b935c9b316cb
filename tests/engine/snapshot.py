"""Everything about a model that attaching could leave behind."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

HOOKS = tuple(name for name in nn.Module().__dict__ if "hook" in name)
OWN = (*HOOKS, "rope_deltas")  # Qwen2.5-VL itself changes the last at every forward


def snapshot(model: nn.Module) -> dict[str, Any]:
    """Per module: its class, its attributes, its hooks, its configuration (object and content); and all weights."""
    found: dict[str, Any] = {}
    written: dict[int, str] = {}  # many modules hold one configuration
    for name, module in model.named_modules():
        found[f"{name}: class"] = type(module)
        found[f"{name}: attributes"] = {
            k: id(v) for k, v in module.__dict__.items() if k not in HOOKS and k != "rope_deltas"
        }
        found[f"{name}: hooks"] = {
            k: list(v) for k, v in module.__dict__.items() if k in HOOKS and hasattr(v, "__len__")
        }
        config = getattr(module, "config", None)
        if config is not None:
            if id(config) not in written:
                written[id(config)] = repr(sorted(config.__dict__.items(), key=str))
            found[f"{name}: config"] = (id(config), written[id(config)])
    found["generation config"] = repr(model.generation_config)
    return found


def weights(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: value.clone() for name, value in model.state_dict().items()}


def differences(before: dict[str, Any], after: dict[str, Any]) -> list[str]:
    """What changed, named, so that a failure says where."""
    return [
        f"{k}: {before.get(k)} → {after.get(k)}" for k in before.keys() | after.keys() if before.get(k) != after.get(k)
    ]


def same_weights(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)
