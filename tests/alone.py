"""What the encoder of a class does with one picture: a plain copy runs it alone and unpadded, and its modules are read.

Nothing here imports winnow.
"""

from __future__ import annotations

import copy
import inspect
from collections import defaultdict
from dataclasses import dataclass
from typing import Any

import torch
from builds.build import TEXT, Build
from torch import Tensor, nn
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

NAME = "recorded"
_recorded: dict[nn.Module, list[tuple[Tensor, Tensor]]] = defaultdict(list)


def _attend(
    module: nn.Module, q: Tensor, k: Tensor, v: Tensor, attention_mask: Any, scaling: float, **kwargs: Any
) -> Any:
    """Eager attention, written out, that keeps its weights and keys."""
    logits = torch.einsum("bhqd,bhkd->bhqk", q, k) * scaling
    weights = (logits if attention_mask is None else logits + attention_mask).softmax(-1)
    _recorded[module].append((weights, k))
    return torch.einsum("bhqk,bhkd->bqhd", weights, v), weights


ALL_ATTENTION_FUNCTIONS.register(NAME, _attend)
ALL_MASK_ATTENTION_FUNCTIONS.register(NAME, ALL_MASK_ATTENTION_FUNCTIONS["eager"])


@dataclass
class Alone:
    """One picture in its encoder; rows are patches (with [CLS] where there is one) or tokens.

    Attributes:
        received: for each block, `[N]` the mean over heads and queries of the attention that each patch receives.
        keys: for each block, `[N, d]` the mean over heads.
        before, after: for each block, `[N, D]` its input and its output.
        projector: `[N, D]` what the projector reads.
        projected: `[tokens, D]` what the encoder gives the language model.
    """

    received: list[Tensor]
    keys: list[Tensor]
    before: list[Tensor]
    after: list[Tensor]
    projector: Tensor
    projected: Tensor


def items(build: Build, row: str, seed: int = 0) -> list[tuple[str, dict[str, Tensor]]]:
    """The letters of a row, each with the tensors that `build.sample` gives it."""
    generator = torch.Generator().manual_seed(1000 * seed + sum(map(ord, row)))
    found = []
    for word in row.split():
        if word.isdigit():
            torch.randint(*TEXT, (int(word),), generator=generator)
        else:
            found.append((word, build.picture(word, generator)[1]))
    return found


class Encoders:
    """A plain copy of a model; the original is never touched.

    Args:
        blocks, attention, projector: paths of the tower's blocks (None: it has none), of a block's attention, and of
            the projector.
    """

    def __init__(self, model: nn.Module, blocks: str | None, attention: str, projector: str) -> None:
        self.model: Any = copy.deepcopy(model)
        self.model.set_attn_implementation(NAME)
        self.base = self.model.base_model
        self.blocks: Any = nn.ModuleList() if blocks is None else self.base.get_submodule(blocks)
        self.attentions = [getattr(block, attention) for block in self.blocks]
        self.projector = self.base.get_submodule(projector)

    @torch.no_grad()
    def run(self, method: str, tensors: dict[str, Tensor]) -> Alone:
        """Encode one picture or video alone."""
        encode = getattr(self.base, method)
        given = {k: v for k, v in tensors.items() if k in inspect.signature(encode).parameters}
        seen: dict[nn.Module, tuple[Tensor, Tensor]] = {}

        def listen(module: nn.Module, args: tuple, kwargs: dict, output: Any) -> None:
            first = args[0] if args else next(iter(kwargs.values()))
            seen[module] = (_flat(first), _flat(output[0] if isinstance(output, tuple) else output))

        _recorded.clear()
        hooks = [m.register_forward_hook(listen, with_kwargs=True) for m in (*self.blocks, self.projector)]
        output = encode(**given, return_dict=True)
        for hook in hooks:
            hook.remove()
        calls = [_recorded[attention] for attention in self.attentions]
        return Alone(
            [torch.cat([weights.mean((1, 2)).flatten() for weights, _ in own]) for own in calls],
            [torch.cat([keys.mean(1).flatten(0, 1) for _, keys in own]) for own in calls],
            [seen[block][0] for block in self.blocks],
            [seen[block][1] for block in self.blocks],
            seen[self.projector][0],
            torch.cat([_flat(rows) for rows in output.pooler_output]),
        )


def _flat(rows: Tensor) -> Tensor:
    return rows.reshape(-1, rows.shape[-1])
