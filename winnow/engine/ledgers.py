"""Writing the ledger of a request, after its prefill."""

from typing import Any

from winnow.cache.layer import HeldLayer, held_bytes
from winnow.core.ledger import Ledger, add_notes
from winnow.engine.flops import lm_flops
from winnow.engine.kv import context_of
from winnow.engine.lm_pass import LMPass
from winnow.engine.packed import row_mask
from winnow.engine.request import Request, listened, padding_mask


def write_ledger(request: Request, lm: LMPass | None, arguments: dict[str, Any], cache: Any) -> Ledger | None:
    """What happened to this request; None where its ledger stands already (a decoded token, a turn on its cache).

    Counts are known on the host; indices stay where they are.

    Args:
        lm: the pass, where there was something to do.
        arguments: of the language model.
        cache: that it returned, if any.
    """
    if lm is None or not lm.items:
        cache = arguments.get(request.bound.cache_name) if cache is None else cache
        embeds = arguments["inputs_embeds"]
        rows, length = embeds.shape[:2]
        if lm is not None or (cache is not None and cache.get_seq_length() > length):
            return None
        ledger = _in_full(request, arguments, rows, length)
        _count_bytes(ledger, cache, length)
        return ledger
    for item in lm.items:
        item.record.ids = item.ids
    depth = len(request.bound.layers)
    layers = tuple(lm.packing_at(index).sizes for index in range(depth))
    sizes = lm.tokens.initial.sizes
    ledger = ledger_of(request, sizes, layers, lm.notes)
    ledger.items = tuple(item.record for item in lm.items)
    _count_bytes(ledger, lm.cache, lm.before + lm.tokens.initial.logical)
    return ledger


def text_ledger(request: Request, cache: Any) -> Ledger | None:
    """The ledger of a model without pictures; None for a decoded token."""
    ids = request.called.get("input_ids")
    new = request.called.get("inputs_embeds") if ids is None else ids
    rows, length = new.shape[:2]  # type: ignore[union-attr]
    if cache is not None and cache.get_seq_length() > length:
        return None
    mask = request.called.get("attention_mask")
    _, sizes, *_ = row_mask(mask if getattr(mask, "ndim", 0) == 2 else None, rows, length, new.device)  # type: ignore[union-attr]
    notes = {"read_in_full": "a language model reads no pictures; what a plan leaves is its cache"}
    ledger = ledger_of(request, sizes, (sizes,) * len(request.bound.layers), notes)
    _count_bytes(ledger, cache, length)
    return ledger


def _count_bytes(ledger: Ledger, cache: Any, length: int) -> None:
    """Bytes of keys and values that a cache holds, and those of a plain one that has seen `length` tokens."""
    layers = getattr(cache, "layers", ())
    ledger.kv_bytes = held_bytes(cache)
    context = context_of(cache)
    if context is not None:
        context.forget()
        ledger.kv_slots = tuple(layer.slots_held if isinstance(layer, HeldLayer) else None for layer in layers)
        add_notes(ledger.notes, context.notes)
    for layer in layers:
        if isinstance(layer, HeldLayer):
            ledger.kv_bytes_full += layer.token_bytes * length
        elif getattr(layer, "keys", None) is not None and layer.keys.numel():
            bytes_ = layer.keys.nbytes + layer.values.nbytes
            window = getattr(layer, "sliding_window", None)
            seen = length if window is None else min(length, window - 1)
            ledger.kv_bytes_full += bytes_ // layer.keys.shape[-2] * seen


def ledger_of(
    request: Request, sizes: tuple[int, ...], layers: tuple[tuple[int, ...], ...], notes: dict[str, Any]
) -> Ledger:
    """A ledger without items: what each sample had, and what each layer read of it."""
    config, plan = request.bound.lm.config, request.plan
    return Ledger(
        plan=plan.plan.key,
        positions=plan.plan.positions,
        resolved=plan.resolved.key,
        adapter=request.bound.family.name,
        logical=sizes,
        layer_tokens=layers,
        flops=lm_flops(config, layers),
        flops_full=lm_flops(config, (sizes,) * len(layers)),
        times=request.clock.times,
        notes=notes,
    )


def _in_full(request: Request, arguments: dict[str, Any], rows: int, length: int) -> Ledger:
    """A request without items: everything was read, and the ledger says why."""
    given = padding_mask(request, arguments)
    two_d = given if getattr(given, "ndim", 0) == 2 else None
    _, sizes, *_ = row_mask(two_d, rows, length, arguments["inputs_embeds"].device)
    reason = why_in_full(request, request.called.get("input_ids"))
    return ledger_of(request, sizes, (sizes,) * len(request.bound.layers), {"read_in_full": reason})


def why_in_full(request: Request, ids: Any) -> str:
    """Why a request has no items.

    Args:
        ids: of its prompt, if there were any.
    """
    words = {m: int((ids == t).sum()) for m, t in listened(request).items()} if ids is not None else {}
    left = [f"{count} {modality} placeholders" for modality, count in words.items() if count]
    if ids is None:
        return "only inputs_embeds were given: pictures in them cannot be told from text, and were read in full"
    if left:
        return f"the prompt holds {' and '.join(left)}, but no pixels came with it: they were read as words"
    return "no picture came with the request"
