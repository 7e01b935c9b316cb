"""What a plain model says if it cannot read some tokens: the reference of `winnow doctor`.

Who cannot be read from a layer on might as well not be there. So the plain model runs on the whole prompt, with its own
masks, windows and positions, and hooks on its layers hide the keys of the dropped tokens. Layers that keep a state have
no keys to hide; models that have such layers run on the rows that stay instead.
"""

import inspect
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import LogitsProcessor

from winnow.engine.bound_model import BoundModel
from winnow.engine.cache import held_by
from winnow.engine.versions import cache_of


class Forced(LogitsProcessor):
    """Says these tokens, behind a prompt of this length."""

    def __init__(self, tokens: Sequence[int], start: int) -> None:
        self.tokens, self.start = tokens, start

    def __call__(self, ids: Tensor, scores: Tensor) -> Tensor:
        chosen = torch.full_like(scores, -torch.inf)
        chosen[:, self.tokens[ids.shape[1] - self.start]] = 0
        return chosen


def without(
    bound: BoundModel,
    model: Any,
    inputs: dict[str, Tensor],
    gone: Tensor,
    forced: Sequence[int],
    decoded_in: Sequence[int] | None = None,
) -> Tensor:
    """`[T, vocabulary]` what the plain model says behind the prompt and behind each token, without some of the prompt.

    Args:
        inputs: one request, unpadded.
        gone: `[k]` the positions that nobody reads.
        forced: the T tokens that it goes on with, the last of which is not read.
        decoded_in: layers in which the tokens that it goes on with do not read them, and nothing else is hidden; None:
            no layer and no token does.
    """
    start = inputs["input_ids"].shape[1]
    stays = torch.ones(start, dtype=torch.bool)
    stays[gone.cpu()] = False
    linear = any(bound.is_linear(i) for i in range(len(bound.layers)))
    hide = _Gather(stays) if linear and decoded_in is None else _Hide(bound, gone, start, decoded_in)
    hooks = [
        layer.register_forward_pre_hook(lambda m, args, kwargs, i=i: hide(i, m, args, kwargs), with_kwargs=True)
        for i, layer in enumerate(bound.layers)
    ]
    return _said(model, inputs, forced, hooks)


def without_columns(
    bound: BoundModel, model: Any, inputs: dict[str, Tensor], gone: Tensor, forced: Sequence[int]
) -> Tensor:
    """The same where pictures are read by cross-attention.

    Args:
        gone: `[k]` which states of pictures nobody reads.
    """

    def hide(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        mask = kwargs["cross_attention_mask"].clone()
        mask[..., gone.to(mask.device)] = torch.finfo(mask.dtype).min
        return args, {**kwargs, "cross_attention_mask": mask}

    return _said(model, inputs, forced, [bound.lm.register_forward_pre_hook(hide, with_kwargs=True)])


def _said(model: Any, inputs: dict[str, Tensor], forced: Sequence[int], hooks: Sequence[Any]) -> Tensor:
    """What the model says under these hooks, which are removed."""
    inputs = {name: value for name, value in inputs.items() if name != "attention_mask"}  # one request has no padding
    start = inputs["input_ids"].shape[1]
    try:
        output = model.generate(
            **inputs, max_new_tokens=len(forced), min_new_tokens=len(forced), do_sample=False, disable_compile=True,
            logits_processor=[Forced(forced, start)], output_logits=True, return_dict_in_generate=True,
        )  # fmt: skip
    finally:
        for hook in hooks:
            hook.remove()
    return torch.cat(output.logits)


class _Hide:
    """Hides keys in the masks of layers; see `without`."""

    def __init__(self, bound: BoundModel, gone: Tensor, start: int, decoded_in: Sequence[int] | None) -> None:
        self.bound, self.gone, self.start, self.decoded_in = bound, gone, start, decoded_in
        self.total = 0
        self.held: list[int] = []

    def __call__(self, index: int, module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        names = list(inspect.signature(type(module).forward).parameters)[1:]
        given = dict(zip(names, args, strict=False)) | kwargs
        hidden = given[names[0]]
        if index == 0:  # layers that share keys run when the cache has grown already
            self.total += hidden.shape[-2]
            self.held = [held_by(cache_of(given), own) for own in self.bound.kv_of]
        if self.decoded_in is not None and (self.total <= self.start or index not in self.decoded_in):
            return args, kwargs
        mask, length = given.get("attention_mask"), hidden.shape[-2]
        if mask is None:
            held = self.held[index]
            keys = torch.arange(held + length, device=hidden.device)
            mask = (keys[None] <= keys[held:, None])[None, None]
            if self.bound.lm.config._attn_implementation == "eager":
                least = torch.finfo(hidden.dtype).min
                mask = torch.zeros_like(mask, dtype=hidden.dtype).masked_fill(~mask, least)
        at = self.gone.to(mask.device) - (self.total - mask.shape[-1])  # a sliding cache forgets its first positions
        mask = mask.clone()
        mask[..., at[at >= 0]] = False if mask.dtype == torch.bool else torch.finfo(mask.dtype).min
        place = names.index("attention_mask") if "attention_mask" in names else len(args)
        if place < len(args):
            return (*args[:place], mask, *args[place + 1 :]), kwargs
        return args, {**kwargs, "attention_mask": mask}


class _Gather:
    """Lets the first layer, and all later ones, have the rows that stay; one request under SDPA needs no mask."""

    def __init__(self, stays: Tensor) -> None:
        self.stays = stays

    def __call__(self, index: int, module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        def rows(name: str, value: Any) -> Any:
            if name == "attention_mask":
                return None
            if isinstance(value, tuple):
                return tuple(rows(name, x) for x in value)
            if not isinstance(value, Tensor):
                return value
            at = self.stays.nonzero()[:, 0].to(value.device)
            whole = [d for d in (1, value.ndim - 2) if 0 < d < value.ndim and value.shape[d] == len(self.stays)]
            return value.index_select(whole[0], at) if whole else value

        return tuple(rows("", x) for x in args), {name: rows(name, x) for name, x in kwargs.items()}
