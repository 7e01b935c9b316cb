"""Writing the ledger of a request, after its prefill."""

from __future__ import annotations

from typing import TYPE_CHECKING

from winnow.core.ledger import Ledger
from winnow.engine.flops import kv_bytes_per_token, lm_flops

if TYPE_CHECKING:
    from winnow.engine.attach import Engine
    from winnow.engine.chunk import Chunk


def write_ledger(engine: Engine, chunk: Chunk) -> None:
    """What happened to the items of this chunk. Counts are known on the host; indices stay where they are."""
    for item in chunk.items:
        item.record.ids = item.ids
    layers = tuple(chunk.layer_packings[i].sizes for i in sorted(chunk.layer_packings))
    full = (chunk.initial.sizes,) * len(layers)
    config = engine.lm.config
    plan = chunk.compiled.plan
    ledger = Ledger(
        plan=plan.key,
        positions=plan.positions,
        logical=chunk.initial.sizes,
        items=tuple(item.record for item in chunk.items),
        layer_tokens=layers,
        flops=lm_flops(config, layers),
        flops_full=lm_flops(config, full),
        times=engine.clock.times() if engine.clock.on else {},
        notes=chunk.notes,
    )
    if chunk.cache is not None:
        held = chunk.cache.layers
        ledger.kv_bytes = sum(layer.keys.nbytes + layer.values.nbytes for layer in held)
        size = held[0].keys.element_size()
        rows, before = len(chunk.initial.sizes), chunk.before
        ledger.kv_bytes_full = rows * (before + chunk.initial.logical) * len(held) * kv_bytes_per_token(config, size)
    engine.last = ledger
    engine.last_here.set(ledger)
