"""Taps: seeing the queries and keys of one attention module, with its outputs left bit for bit as they were.

One attention module gets a shallow copy of its configuration that names an attention function of ours; it shows the
queries and keys (after position embedding) to a listener and then calls the implementation that the module had. The
model's own configuration is not touched, so masks and all other layers are as before.
"""

from __future__ import annotations

import copy
import sys
from collections.abc import Callable
from contextvars import ContextVar
from typing import Any

from torch import Tensor, nn
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

IMPLEMENTATION = "winnow_tap"
Listener = Callable[[nn.Module, Tensor, Tensor], None]


class Stop(Exception):
    """Ends a probed attention call."""


probed: ContextVar[list[tuple[Tensor, Tensor]] | None] = ContextVar("winnow_probed", default=None)


class _Wire:
    """What a tapped configuration carries. Copies and pickles of it are dead wires: a copied model is a plain model."""

    def __init__(self, base: str = "eager", listener: Listener | None = None) -> None:
        self.base = base
        self.listener = listener

    def __deepcopy__(self, memo: dict[int, Any]) -> _Wire:
        return _Wire(self.base)

    def __reduce__(self) -> tuple[Any, ...]:
        return _Wire, (self.base,)


def _tapped_attention(module: Any, query: Tensor, key: Tensor, value: Tensor, *args: Any, **kwargs: Any) -> Any:
    wire: _Wire = module.config._winnow_wire
    box = probed.get()
    if box is not None:
        box.append((query, key))
        raise Stop
    if wire.listener is not None:
        wire.listener(module, query, key)
    eager: Any = getattr(sys.modules[type(module).__module__], "eager_attention_forward", None)
    return ALL_ATTENTION_FUNCTIONS.get_interface(wire.base, eager)(module, query, key, value, *args, **kwargs)


ALL_ATTENTION_FUNCTIONS.register(IMPLEMENTATION, _tapped_attention)


class Tap:
    """Shows the queries `[b, H, N, d]` and keys `[b, G, N, d]` of one attention module until it is removed."""

    def __init__(self, module: Any, listener: Listener) -> None:
        self.module = module
        self.plain: Any = module.config
        tapped = copy.copy(self.plain)
        tapped._attn_implementation_internal = IMPLEMENTATION
        tapped._winnow_wire = _Wire(self.plain._attn_implementation, listener)
        module.config = tapped

    def remove(self) -> None:
        self.module.config = self.plain


def probe(attention: nn.Module, **inputs: Any) -> tuple[Tensor, Tensor]:
    """Queries and keys that a tapped attention module would use on these inputs; it stops before it attends."""
    box: list[tuple[Tensor, Tensor]] = []
    token = probed.set(box)
    try:
        attention(**inputs)
    except Stop:
        pass
    finally:
        probed.reset(token)
    return box[0]


def scaling_of(attention: nn.Module, q: Tensor) -> float:
    """What an attention module multiplies its logits with."""
    return getattr(attention, "scaling", None) or getattr(attention, "scale", None) or q.shape[-1] ** -0.5
