"""Taps: what passes vLLM's vision tower, shown to the library's signals.

All towers of vLLM attend through one module, which is given queries and keys after their projection and rotation.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from winnow.core.errors import UnsupportedError
from winnow.core.signal import Site, block_index
from winnow.engine import encoder
from winnow.engine.bound_plan import BoundPlan
from winnow.engine.encoding import EncoderRecord
from winnow.engine.request import Request
from winnow.serve.vllm.subject import Subject, tower_output
from winnow.signals.vision import HiddenStates

_BLOCK = re.compile(r"^(.*\.(?:blocks|layers?)\.\d+)\.")


class Taps:
    """The places of a served model at which signals can be read.

    Args:
        model: of vLLM.
        subject: the same model as the library knows it.
    """

    def __init__(self, model: Any, subject: Subject) -> None:
        from vllm.model_executor.layers.attention.mm_encoder_attention import MMEncoderAttention

        self.subject = subject
        self.device = next(model.parameters()).device
        self.projector: Any = getattr(model, "multi_modal_projector", None)
        found = [(name, module) for name, module in model.named_modules() if isinstance(module, MMEncoderAttention)]
        self.attention = [module for _, module in found]
        blocks = [match[1] for name, _ in found if (match := _BLOCK.match(name))]
        self.blocks = [model.get_submodule(name) for name in blocks]

    def check(self, plan: BoundPlan) -> None:
        """Refuse a plan that looks where vLLM has nothing to show."""
        for site, signals in plan.listeners.items():
            if site.stack == "vision" and (site.index >= len(self.attention) or len(self.blocks) < len(self.attention)):
                raise UnsupportedError(
                    f"{plan.plan} looks at block {site.index} of the vision tower ({signals[0]}); vLLM has loaded "
                    f"{len(self.attention)} blocks whose attention can be seen, those that the model needs."
                )

    @contextmanager
    def listening(self, plan: BoundPlan, record: EncoderRecord) -> Iterator[Request]:
        """Let the signals of a plan read one call of the encoder into its record."""
        request = self.subject.request(plan, record, self.device)
        hooks: list[Any] = []
        try:
            for site in plan.listeners:
                if site.stack == "vision" and site.shows == "attention":
                    hook = functools.partial(self._see_attention, request, site)
                    hooks.append(self.attention[site.index].register_forward_pre_hook(hook, with_kwargs=True))
                elif site.stack == "vision":
                    hook = functools.partial(self._see_block, request, site)
                    hooks.append(self.blocks[site.index].register_forward_hook(hook, with_kwargs=True))
            if plan.features:
                info = self.subject.bound.info
                feeding = self.blocks[block_index(info.feature_layer, info.vision_depth, "the tower")]
                hooks += [
                    feeding.register_forward_hook(functools.partial(self._leave_tower, request)),
                    self.projector.register_forward_pre_hook(functools.partial(self._enter_projector, request)),
                    self.projector.register_forward_hook(functools.partial(self._leave_projector, request)),
                ]
            yield request
        finally:
            for hook in hooks:
                hook.remove()

    def _see_attention(self, request: Request, site: Site, module: Any, args: Any, kwargs: Any) -> None:
        named = dict(zip(("query", "key", "value", "cu_seqlens"), args, strict=False)) | kwargs
        q, k, v = (_heads(named[name], module) for name in ("query", "key", "value"))
        ends = named.get("cu_seqlens")
        lengths = [q.shape[2]] if ends is None else torch.as_tensor(ends).diff().tolist()
        for part in zip(*(x.split(lengths, dim=2) for x in (q, k, v)), strict=True):
            encoder.read_attention(request, site, module, *part)

    def _see_block(self, request: Request, site: Site, module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        before = args[0] if args else next(iter(kwargs.values()))
        after = output[0] if isinstance(output, tuple) else output
        shown = HiddenStates(_tiles(before), _tiles(after), int(self.subject.bound.info.has_cls))
        encoder.read(request, site, shown)

    def _leave_tower(self, request: Request, module: nn.Module, args: Any, output: Any) -> None:
        record: Any = request.encoding
        record.tower_output = tower_output(request.bound.model, output[0] if isinstance(output, tuple) else output)

    def _enter_projector(self, request: Request, module: nn.Module, args: Any) -> Any:
        rows = encoder.enter_projector(request, args[0])
        return None if rows is None else (rows, *args[1:])

    def _leave_projector(self, request: Request, module: nn.Module, args: Any, output: Tensor) -> Any:
        record: Any = request.encoding
        return encoder.take_projected(request, output) if record.reduced else None


def _heads(x: Tensor, module: Any) -> Tensor:
    """`[b, N, H · d]` or `[b, N, H, d]` → `[b, H, N, d]`."""
    x = x if x.ndim == 4 else x.unflatten(-1, (-1, module.head_size))
    x = x.transpose(1, 2)
    return x if x.shape[1] == module.num_heads else x.repeat_interleave(module.num_heads // x.shape[1], 1)


def _tiles(x: Tensor) -> Tensor:
    """A packed tower has `[N, 1, C]`, which the library sees as one sequence, `[1, N, C]`."""
    return x.transpose(0, 1) if x.ndim == 3 and x.shape[1] == 1 and x.shape[0] > 1 else x
