"""Muon for the matrices inside the layers, AdamW for the rest, and the schedule of their learning rates."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import nn


class Optimizer:
    """Two optimizers that step together; learning rates are the base rates times `scale`.

    Muon takes the matrices of modules whose names have one of `inside` in them.
    """

    def __init__(
        self,
        modules: Iterable[nn.Module],
        muon_rate: float,
        adam_rate: float,
        decay: float = 0.03,
        inside: Sequence[str] = ("layers.",),
    ) -> None:
        matrices: list[nn.Parameter] = []
        rest: list[nn.Parameter] = []
        for module in modules:
            for name, parameter in module.named_parameters():
                if parameter.requires_grad:
                    matrix = parameter.ndim == 2 and any(part in name for part in inside)
                    (matrices if matrix else rest).append(parameter)
        self.parameters = matrices + rest
        self.parts: list[torch.optim.Optimizer] = []
        if matrices:
            self.parts.append(
                torch.optim.Muon(matrices, lr=muon_rate, weight_decay=decay, adjust_lr_fn="match_rms_adamw")
            )
        self.parts.append(torch.optim.AdamW(rest, lr=adam_rate, weight_decay=0.01, betas=(0.9, 0.98), fused=True))
        self.base = [part.param_groups[0]["lr"] for part in self.parts]

    def step(self, scale: float, clip: float = 2.0) -> None:
        """One update at `scale` times the base rates, the gradient's norm clipped to `clip`; clears the gradients."""
        torch.nn.utils.clip_grad_norm_(self.parameters, clip)
        for part, rate in zip(self.parts, self.base, strict=True):
            for group in part.param_groups:
                group["lr"] = rate * scale
            part.step()
            part.zero_grad(set_to_none=True)

    def state_dict(self) -> list[dict[str, Any]]:
        return [part.state_dict() for part in self.parts]

    def load_state_dict(self, state: list[dict[str, Any]]) -> None:
        for part, saved in zip(self.parts, state, strict=True):
            part.load_state_dict(saved)


def ramp(step: int, steps: int, decay: bool, warmup: int = 50, floor: float = 0.02) -> float:
    """The share of the base rates at a step: warm-up, constant, and with `decay` linear to `floor` from half way."""
    left = 2 * (steps - step) / steps if decay else 1.0
    return min((step + 1) / warmup, 1.0, max(left, floor))
