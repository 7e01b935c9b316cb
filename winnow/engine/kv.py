"""The cache of a request under a plan with steps at `kv`: its layers are put in place before the model runs."""

import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import DynamicCache, DynamicLayer

from winnow.cache.context import Context
from winnow.cache.layer import HeldLayer
from winnow.cache.rotary import Rotary
from winnow.core.errors import UnsupportedError
from winnow.core.kv_budget import KINDS
from winnow.core.packing import Packing
from winnow.engine.bound_model import BoundModel
from winnow.engine.cache import check_cache
from winnow.engine.request import Request
from winnow.engine.versions import cache_of


class BoundedCache(DynamicCache):
    """A cache whose compressed layers allocate their keys and values once, behind the prompt; `Handle.bounded_cache`.

    Args:
        config: of the language model.
        max_new_tokens: for which there is room.
    """

    def __init__(self, config: Any, max_new_tokens: int) -> None:
        super().__init__(config=config)
        self.max_new_tokens = max_new_tokens


def held_layers(bound: BoundModel) -> tuple[int, ...]:
    """The layers whose cache can be compressed: those that attend to everything before them."""
    return tuple(i for i, kind in enumerate(bound.kinds) if kind == "full_attention" and bound.kv_of[i] == i)


def check_model(bound: BoundModel, plan: str) -> None:
    """Refuse models whose cache cannot be compressed."""
    if bound.family.cross:
        raise UnsupportedError(
            f"{plan} compresses the cache, and that of {bound.info.model} holds pictures apart, for cross-attention; "
            "use a method that acts at projected."
        )
    if any(own != i for i, own in enumerate(bound.kv_of)):
        raise UnsupportedError(
            f"{plan} compresses the cache, and some layers of {bound.info.model} read the keys of others; use a method "
            "that acts before the language model or in its layers."
        )
    own = getattr(bound.model, "_supports_default_dynamic_cache", None)
    if own is not None and not own():
        raise UnsupportedError(f"{plan} compresses the cache, and {bound.info.model} has a cache of another kind.")
    if not held_layers(bound):
        raise UnsupportedError(
            f"{plan} compresses the cache of layers that attend to everything before; {bound.info.model} has none."
        )


def hold(request: Request, arguments: dict[str, Any]) -> dict[str, Any]:
    """The arguments of the language model, with a cache whose layers follow the plan.

    A cache that was compressed before goes on under the plan that it began with.

    Raises:
        UnsupportedError: there is no cache, or one of another kind.
    """
    bound, plan = request.bound, request.plan
    if not plan.kv:
        return arguments
    cache = arguments.get(bound.cache_name)
    if cache is None:
        wanted = arguments.get("use_cache")
        if not (bound.lm.config.use_cache if wanted is None else wanted):
            if not plan.needs_cache:
                return arguments
            raise UnsupportedError(
                f"{plan.plan} compresses the KV cache, and this call has none (use_cache=False); leave use_cache on, "
                "or use handle.using('full') for it."
            )
        cache = DynamicCache(config=bound.lm.config)
        arguments = {**arguments, bound.cache_name: cache}
    if context_of(cache) is not None:
        return arguments
    check_cache(cache, bound.windowed)
    context = Context(
        request.attachment,
        tuple(method.slug for method in plan.plan.methods),
        len(bound.layers),
        plan.plan.seed,
        plan.modules,
        rotary_of(bound),
        room=getattr(cache, "max_new_tokens", None),
    )
    wanted = held_layers(bound)
    while len(cache.layers) < len(bound.layers):
        cache.layers.append(DynamicLayer())  # as the cache itself would, one by one
    for index in wanted:
        plain = cache.layers[index]
        if type(plain) is not DynamicLayer:
            raise UnsupportedError(
                f"a cache with {type(plain).__name__} is not compressed; use the default dynamic cache."
            )
        made = HeldLayer(index, plan.kv.get(index, ()), context)  # type: ignore[arg-type]
        if plain.get_seq_length():
            made.adopt(plain.keys, plain.values)  # type: ignore[arg-type]
        cache.layers[index] = made
    context.layers = cache.layers
    return arguments


def enter_text(request: Request, called: dict[str, Any]) -> dict[str, Any]:
    """The arguments of a model without pictures: its base is its language model, and there is nothing but the cache."""
    request.reached_lm = True
    given = hold(request, called)
    new = given.get("input_ids")
    tell_cache(request, {**given, "inputs_embeds": given.get("inputs_embeds") if new is None else new})
    return given


def tell_cache(request: Request, arguments: dict[str, Any]) -> None:
    """Tell a compressed cache which tokens its layers read in this forward and, where its plan asks, what they are."""
    context = context_of(cache_of(arguments))
    if context is not None:
        context.reads = reads_of(request.lm)
    if context is not None and request.plan.asks_kinds:
        context.kinds = kinds_of(request.lm, arguments["inputs_embeds"])
    if context is not None and request.plan.asks_places:
        context.places = places_of(request, arguments)


def show_call(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """Before an attention module: its compressed cache takes down what it is called with, where a step asks."""
    cache = cache_of(kwargs)
    layers = getattr(cache, "layers", ())
    layer = layers[module.layer_idx] if module.layer_idx < len(layers) else None
    if isinstance(layer, HeldLayer) and layer.runner.wants_calls:
        layer.called = {"hidden_states": args[0], **kwargs} if args else dict(kwargs)


def context_of(cache: Any) -> Context | None:
    """What the layers of a compressed cache share; None where it is a plain one."""
    layer = next((layer for layer in getattr(cache, "layers", ()) if isinstance(layer, HeldLayer)), None)
    return None if layer is None else layer.context


_rotaries: "weakref.WeakKeyDictionary[BoundModel, Rotary | None]" = weakref.WeakKeyDictionary()


def rotary_of(bound: BoundModel) -> Rotary | None:
    """The model's rotation, where it is understood; compared with the model's own function once."""
    if bound not in _rotaries:
        _rotaries[bound] = Rotary.of(bound.lm, bound.attention_of(held_layers(bound)[0]))
    return _rotaries[bound]


def reads_of(lm: Any) -> Callable[[int], tuple[Packing, Tensor | None]] | None:
    """What tells a layer that runs now which tokens it reads, and which of its older slots are real.

    Args:
        lm: the pass; None where every layer reads all.
    """
    return None if lm is None else lambda index: (lm.tokens.packing, lm.past_mask(lm.past(index)))


def places_of(request: Request, arguments: dict[str, Any]) -> Callable[[int], Tensor]:
    """What gives `[B, n]`, or `[B, n, 3]` on three axes, where each token stands that a layer reads now."""
    lm, rows, axes = request.lm, arguments["inputs_embeds"].shape[0], request.bound.family.axes
    given: Any = arguments.get("position_ids")
    if lm is None and given is None:
        length = arguments["inputs_embeds"].shape[1]
        cache = cache_of(arguments)
        given = cache.get_seq_length() + torch.arange(length, device=arguments["inputs_embeds"].device)[None]

    def now(index: int) -> Tensor:
        at: Tensor = given if lm is None else lm.tokens.position_ids(lm.past(index))
        if at.ndim == 3:  # some give the position in the text before the three
            return at[-axes:].expand(-1, rows, -1).permute(1, 2, 0)
        at = at.expand(rows, -1)
        return at[..., None].expand(-1, -1, axes) if request.bound.info.mrope else at

    return now


def kinds_of(lm: Any, embeds: Tensor) -> Callable[[], Tensor]:
    """What gives `[B, n]` the kind of each token that the running layer reads now.

    Args:
        lm: the pass; None where there is no picture.
        embeds: `[B, n, …]` with which the language model is entered.
    """

    def now() -> Tensor:
        if lm is None:
            return torch.zeros(embeds.shape[:2], dtype=torch.int8, device=embeds.device)
        packing = lm.tokens.packing
        found = torch.zeros(len(packing.sizes), packing.width, dtype=torch.int8, device=embeds.device)
        for item in lm.items:
            code = KINDS.index(item.record.modality)
            for slots in (item.slots, item.separator_slots):
                if slots is not None:
                    found[item.row, slots.to(embeds.device)] = code
        return found

    return now
