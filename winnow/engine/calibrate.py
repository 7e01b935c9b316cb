"""calibrate: a plan whose methods were fitted to a model."""

import dataclasses
import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from winnow.core.method import Method
from winnow.core.plan import Plan
from winnow.engine.attach import attach
from winnow.models.families import unwrap


def calibrate(model: Any, plan: str | Plan | Method) -> Plan:
    """The plan with settings that belong to this model, found by running it; its string holds them.

        plan = winnow.calibrate(model, "razorattention:keep=20%")
        handle = winnow.compress(model, plan)  # or str(plan), later

    Args:
        model: which is not compressed now.
        plan: as `compress` takes it. Methods that have nothing to fit stay as they are.
    """
    given = Plan.of(plan)
    inner: Any = unwrap(model)

    @torch.no_grad()
    def run(method: Method, text: Callable[[Tensor], Tensor]) -> None:
        """Run the language model once under a method.

        Args:
            text: from the ids of all ordinary tokens `[V]` to those that are read `[B, T]`; a token that begins every
                text goes ahead of them.
        """
        handle = attach(model, Plan((method,), seed=given.seed))
        try:
            device = inner.get_input_embeddings().weight.device
            ids = text(ordinary_tokens(inner)).to(device)
            begin = getattr(inner.config.get_text_config(), "bos_token_id", None)
            if isinstance(begin, int):
                ids = torch.cat([ids.new_full((len(ids), 1), begin), ids], 1)
            few = "logits_to_keep" in inspect.signature(inner.forward).parameters
            inner(input_ids=ids, use_cache=True, **({"logits_to_keep": 1} if few else {}))
        finally:
            handle.detach()

    return dataclasses.replace(given, methods=tuple(method.calibrate(run) for method in given.methods))


def ordinary_tokens(model: Any) -> Tensor:
    """The ids of all tokens but those that the configuration names (placeholders, ends)."""
    named: set[int] = set()
    for config in (model.config, model.config.get_text_config(), getattr(model, "generation_config", None)):
        for name, value in vars(config).items() if config is not None else ():
            if name.endswith(("token_id", "token_index")):
                named |= set(value if isinstance(value, list | tuple) else [value]) - {None}
    size = model.get_input_embeddings().weight.shape[0]
    return torch.tensor([i for i in range(size) if i not in named])
