"""The reference for every class: the plain model, called as usual, with the keys of what is dropped hidden.

A token that is dropped before layer k can be read by nobody from there on. So the whole sequence runs through a plain
copy of the model (its own masks, windows, positions and caches), and hooks on its layers hide the dropped columns of
the masks. Nothing here imports winnow.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from quick import copied
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
        self.model: Any = copied(model)
        self.model.set_attn_implementation("eager")
        self.lm = decoder(self.model)

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


class Gathered:
    """The reference of classes whose layers keep a state: nobody's key can be hidden there, so rows really leave.

    One sample, unpadded, under SDPA needs no mask, so the rows of a layer and their positions are all that is cut.
    """

    def __init__(self, model: nn.Module) -> None:
        self.model: Any = copied(model)
        self.lm = decoder(self.model)

    @torch.no_grad()
    def run(
        self, sample: dict[str, Tensor], items: Sequence[Tensor], forced: Sequence[int] = (), cuts: Sequence[Cut] = ()
    ) -> Masked:
        """As `MaskedReference.run`."""
        sample = {name: value for name, value in sample.items() if name != "attention_mask"}
        length = sample["input_ids"].shape[1]
        left = [item.clone() for item in items]
        stays = torch.ones(length, dtype=torch.bool)
        lengths: list[int] = []
        state: dict[int, Tensor] = {}

        def before(index: int, module: nn.Module, args: tuple, kwargs: dict) -> Any:
            if index in state:  # a decoded token
                return None
            rows = args[0] if args else kwargs["hidden_states"]
            was = stays.clone()
            for cut in (c for c in cuts if c.layer == index):
                whole = rows.new_zeros(length, rows.shape[-1])
                whole[was] = rows[0]
                if cut.merge is not None:
                    for place, value in cut.merge(whole, left).items():
                        whole[place] = value
                chosen = cut.choose(whole, left)
                for item, own in zip(left, chosen, strict=True):
                    stays[item] = False
                    stays[own] = True
                left[:] = chosen
                rows = whole[stays][None]
            lengths.append(int(stays.sum()))
            state[index] = stays.clone()

            def part(value: Any) -> Any:
                if isinstance(value, tuple):
                    return tuple(part(x) for x in value)
                if isinstance(value, Tensor) and value.ndim > 1 and value.shape[1] == length:
                    return value[:, stays]
                return value

            rest = {
                name: part(value) for name, value in kwargs.items() if name not in ("attention_mask", "hidden_states")
            }
            if args:
                return (rows, *map(part, args[1:])), {**rest, "attention_mask": None}
            return (), {**rest, "attention_mask": None, "hidden_states": rows}

        hooks = [
            layer.register_forward_pre_hook(lambda m, a, k, i=i: before(i, m, a, k), with_kwargs=True)
            for i, layer in enumerate(self.lm.layers)
        ]
        try:
            out = self.model.generate(
                **sample, max_new_tokens=len(forced) + 1, do_sample=False,
                logits_processor=[_Force(list(forced), length)], output_logits=True, return_dict_in_generate=True,
            )  # fmt: skip
        finally:
            for hook in hooks:
                hook.remove()
        return Masked(torch.cat(out.logits), left, tuple(lengths))


def decoder(model: Any) -> Any:
    """The module that runs the layers of the language model."""
    found = model.get_decoder()
    while not hasattr(found, "layers"):
        found = found.model
    return found
