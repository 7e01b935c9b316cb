"""The reference for every class: the plain model, called as usual, with the keys of what is dropped hidden.

A token that is dropped before layer k can be read by nobody from there on. So the whole sequence runs through a plain
copy of the model (its own masks, windows, positions and caches), and hooks on its layers hide the dropped columns of
the masks. Nothing here imports winnow.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from transformers import LogitsProcessor

Rows = Callable[[Tensor, list[Tensor]], list[Tensor]]


@dataclass
class Cut:
    """What is dropped before a layer, worked out when it runs.

    Attributes:
        layer: before which.
        choose: from the rows `[S, D]` that enter the layer and the positions that are left of each item, the positions
            that stay.
        merge: where given, new rows instead: the positions and the values that they get.
    """

    layer: int
    choose: Rows
    merge: Callable[[Tensor, list[Tensor]], dict[int, Tensor]] | None = None


@dataclass
class Masked:
    """What the plain model gives for one sample, with hidden keys.

    Attributes:
        logits: `[T, vocabulary]` behind the prompt and behind each forced token.
        kept: for each item, the positions that are left at the end.
        lengths: tokens that each layer reads.
    """

    logits: Tensor
    kept: list[Tensor] = field(default_factory=list)
    lengths: tuple[int, ...] = ()


class _Force(LogitsProcessor):
    def __init__(self, tokens: Sequence[int], start: int) -> None:
        self.tokens, self.start = tokens, start

    def __call__(self, ids: Tensor, scores: Tensor) -> Tensor:
        at = ids.shape[1] - self.start
        if at < len(self.tokens):
            scores = torch.full_like(scores, -torch.inf)
            scores[:, self.tokens[at]] = 0
        return scores


@dataclass
class Hiding:
    """What the hooks of one run know.

    Attributes:
        length: of the prompt.
        left: for each item, the positions that are left.
        keys: by layer, which positions of the prompt are hidden from it.
    """

    length: int
    left: list[Tensor]
    keys: dict[int, Tensor] = field(default_factory=dict)

    @property
    def lengths(self) -> tuple[int, ...]:
        """Tokens of the prompt that each layer reads."""
        return tuple(int(self.length - self.keys[layer].sum()) for layer in sorted(self.keys))


class MaskedReference:
    """A plain copy of a model under eager attention; the original is never touched."""

    def __init__(self, model: nn.Module) -> None:
        self.model: Any = copy.deepcopy(model)
        self.model.set_attn_implementation("eager")
        self.lm = self.model.get_decoder()

    @torch.no_grad()
    def run(
        self, sample: dict[str, Tensor], items: Sequence[Tensor], forced: Sequence[int] = (), cuts: Sequence[Cut] = ()
    ) -> Masked:
        """One sample, unpadded.

        Args:
            items: the positions of the content tokens of each item.
            forced: tokens that it goes on with.
        """
        given = sample["inputs_embeds"] if "input_ids" not in sample else sample["input_ids"]
        start = given.shape[1] if "input_ids" in sample else 0  # `generate` says no ids for embeddings
        force = _Force(list(forced), start)
        out, hiding = self.generate(sample, items, cuts, max_new_tokens=len(forced) + 1, logits_processor=[force])
        return Masked(torch.cat(out.logits), hiding.left, hiding.lengths)

    @torch.no_grad()
    def generate(
        self, sample: dict[str, Tensor], items: Sequence[Tensor], cuts: Sequence[Cut] = (), **options: Any
    ) -> tuple[Any, Hiding]:
        """One sample, unpadded, in any mode of `generate` in which all rows have the same prompt.

        Returns:
            What `generate` gives, with the raw logits of each step (greedy unless the options say otherwise).
        """
        given = sample["inputs_embeds"] if "input_ids" not in sample else sample["input_ids"]
        hiding = Hiding(given.shape[1], [item.clone() for item in items])
        hooks = self._hooks(hiding, cuts)
        defaults = {"do_sample": False, "return_dict_in_generate": True, "output_logits": True}
        try:
            return self.model.generate(**sample, **defaults | options), hiding
        finally:
            for hook in hooks:
                hook.remove()

    def _hooks(self, hiding: Hiding, cuts: Sequence[Cut]) -> list[Any]:
        total = 0  # tokens that this forward ends with, those of the cache included

        def entering(module: nn.Module, args: tuple, kwargs: dict) -> None:
            nonlocal total
            given = kwargs.get("inputs_embeds")
            given = kwargs.get("input_ids") if given is None else given
            cache = kwargs.get("past_key_values", kwargs.get("cache"))
            total = given.shape[1] + (0 if cache is None else cache.get_seq_length())

        def before(index: int, module: nn.Module, args: tuple, kwargs: dict) -> Any:
            rows = args[0] if args else kwargs["hidden_states"]
            if index not in hiding.keys:
                rows = _cut(hiding, index, rows, cuts)
            mask, dropped = kwargs.get("attention_mask"), hiding.keys[index]
            if dropped.any():
                if mask is None or mask.ndim != 4:
                    raise AssertionError(f"layer {index} got no 4-D mask")
                at = dropped.nonzero()[:, 0]
                at = at - (total - mask.shape[-1])  # a sliding cache has forgotten the first positions
                mask = mask.clone()
                mask[..., at[at >= 0]] = torch.finfo(mask.dtype).min if mask.is_floating_point() else False
                kwargs = {**kwargs, "attention_mask": mask}
            args = (rows, *args[1:]) if args else args
            kwargs = kwargs if args else {**kwargs, "hidden_states": rows}
            return args, kwargs

        hooks = [self.lm.register_forward_pre_hook(entering, with_kwargs=True)]
        return hooks + [
            layer.register_forward_pre_hook(lambda m, a, k, i=i: before(i, m, a, k), with_kwargs=True)
            for i, layer in enumerate(self.lm.layers)
        ]


def _cut(hiding: Hiding, index: int, rows: Tensor, cuts: Sequence[Cut]) -> Tensor:
    """Before a layer that runs for the first time: what is hidden from it, and the rows that it gets."""
    hidden = hiding.keys.get(index - 1, torch.zeros(hiding.length, dtype=torch.bool)).clone()
    for cut in (c for c in cuts if c.layer == index):
        flat = rows if rows.ndim == 3 else rows[0]
        if cut.merge is not None:
            rows = rows.clone()
            for place, value in cut.merge(flat[0], hiding.left).items():
                rows[..., place, :] = value
        stay = cut.choose(flat[0], hiding.left)
        for item, own in zip(hiding.left, stay, strict=True):
            hidden[item] = True
            hidden[own] = False
        hiding.left[:] = stay
    hiding.keys[index] = hidden
    return rows
