"""Taps: seeing the queries, keys and values of one attention module, with its outputs left bit for bit as they were.

A tapped module gets a stand-in for its configuration. It shares every setting with the configuration that it stands
for, now and later, and differs in one thing: the name of the attention implementation, while equal to the model's,
leads transformers' table of attention functions to a function of ours. That one shows what it is given to a listener
and calls the implementation that the model has at this moment. Masks and all other modules are as before.
"""

import copy
import functools
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

from torch import Tensor, nn
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from winnow.core.errors import UnsupportedError
from winnow.signals.sequences import sequences

Listener = Callable[[nn.Module, Tensor, Tensor, Tensor, Any], Tensor | None]
"""Gets the module, queries, keys, values and mask; may return what is added to the logits, as a mask of floats."""

# What attention functions are told beside masks and scales that changes their weights: caps on logits, and sinks.
UNREAD = ("softcap", "s_aux")


class AttendsItself:
    """What a compressed cache gives in the place of keys and values: it attends over what it holds."""

    __slots__ = ()

    def attend(self, plain: Any, module: nn.Module, query: Tensor, mask: Any, *args: Any, **kwargs: Any) -> Any:
        """In the place of the attention function `plain`."""
        raise NotImplementedError

    def shown(self) -> tuple[Any, Any]:
        """Keys and values for those who listen: tensors where nothing was dropped from them yet, else itself."""
        raise NotImplementedError


def refuse_reading(plan: Any) -> None:
    """Raise, for a plan that looks at the attention of a layer that gives something else than keys."""
    raise UnsupportedError(
        f"{plan} looks at the attention of a layer whose logits are capped, or whose cache was compressed before these "
        "pictures came; use another method, or start with a new cache."
    )


class Stop(Exception):
    """Ends a probed attention call."""


probed: ContextVar[list[tuple[Tensor, Tensor]] | None] = ContextVar("winnow_probed", default=None)
_only_shown: ContextVar[bool] = ContextVar("winnow_only_shown", default=False)


class TappedName(str):
    """The name of an attention implementation: equal to the plain one, and another key in a table of functions."""

    __slots__ = ()

    def __hash__(self) -> int:
        return hash(("winnow tap", str.__str__(self)))

    def __eq__(self, other: object) -> bool:
        return str.__eq__(self, other)

    def __ne__(self, other: object) -> bool:
        return not self == other

    def __reduce__(self) -> tuple[Any, ...]:
        return str, (str(self),)


@functools.cache
def _tapped_name(plain: str) -> TappedName:
    name = TappedName(plain)
    ALL_ATTENTION_FUNCTIONS.register(name, _tapped_attention)
    return name


def _plain(config: Any) -> Any:
    """What a copy or a pickle of a stand-in is: the configuration that it stands for."""
    return config


class _StandIn:
    """Mixed into the class of a configuration. Copies and pickles are the plain configuration."""

    __slots__ = ("_winnow_listener", "_winnow_plain")

    @property
    def _attn_implementation(self) -> str | None:
        name = self._winnow_plain._attn_implementation  # type: ignore[attr-defined]
        return name if name is None else _tapped_name(str(name))

    @_attn_implementation.setter
    def _attn_implementation(self, value: Any) -> None:
        self._winnow_plain._attn_implementation = value  # type: ignore[attr-defined]

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        return copy.deepcopy(self._winnow_plain, memo)  # type: ignore[attr-defined]

    def __reduce_ex__(self, protocol: Any) -> tuple[Any, ...]:
        return _plain, (self._winnow_plain,)  # type: ignore[attr-defined]


@functools.cache
def _stand_in_class(kind: Any) -> Any:
    return type(f"Tapped{kind.__name__}", (_StandIn, kind), {"__module__": __name__})


def _stand_in(plain: Any, listener: Listener | None) -> Any:
    kind: Any = type(plain)
    kind = _stand_in_class(kind)
    made = kind.__new__(kind)
    made.__dict__ = plain.__dict__  # every setting is shared
    _StandIn._winnow_plain.__set__(made, plain)  # type: ignore[attr-defined]
    _StandIn._winnow_listener.__set__(made, listener)  # type: ignore[attr-defined]
    return made


def _tapped_attention(
    module: Any, query: Tensor, key: Tensor, value: Tensor, attention_mask: Any = None, *args: Any, **kwargs: Any
) -> Any:
    config = module.config
    box, listener = probed.get(), config._winnow_listener
    if box is not None or listener is not None:
        special = [name for name in UNREAD if kwargs.get(name) is not None]
        if special and (box is not None or not isinstance(key, AttendsItself)):
            raise UnsupportedError(
                f"{type(module).__name__} attends with {', '.join(special)}, which is not read yet; "
                "use a method that does not look at attention there."
            )
    if box is not None:
        box.append((query, key))
        raise Stop
    if listener is not None:
        keys, values = key.shown() if isinstance(key, AttendsItself) and not special else (key, value)
        parts = sequences(module, query, keys, values, attention_mask, kwargs.get("cu_seq_lens_q"))
        heard = [listener(module, *part, attention_mask) for part in parts]
        if _only_shown.get():
            raise Stop
        added = heard[0] if len(heard) == 1 else next((x for x in heard if x is not None), None)
        if added is not None and (attention_mask is not None or len(heard) > 1):
            raise UnsupportedError(
                f"{type(module).__name__} has an attention mask of its own, which is not understood; use a method that "
                "neither weighs tokens by their size nor keeps unequal numbers of them in the tower."
            )
        attention_mask = attention_mask if added is None else added
    eager: Any = getattr(sys.modules[type(module).__module__], "eager_attention_forward", None)
    plain = ALL_ATTENTION_FUNCTIONS.get_interface(config._winnow_plain._attn_implementation, eager)
    if isinstance(key, AttendsItself):
        return key.attend(plain, module, query, attention_mask, *args, **kwargs)
    return plain(module, query, key, value, attention_mask, *args, **kwargs)


class Tap:
    """Shows the queries `[b, H, N, d]`, keys and values `[b, G, N, d]` of one attention module until it is removed."""

    def __init__(self, module: Any, listener: Listener | None = None) -> None:
        if not hasattr(getattr(module, "config", None), "_attn_implementation"):
            raise UnsupportedError(
                f"{type(module).__name__} does not choose its attention by its configuration, so its queries and keys "
                "cannot be seen; use a method that does not look at attention there."
            )
        self.module = module
        self.plain: Any = module.config
        module.config = _stand_in(self.plain, listener)

    def remove(self) -> None:
        self.module.config = self.plain


def probe(call: Callable[..., Any], *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
    """Queries and keys that a tapped attention module would use in this call; it stops before it attends."""
    box: list[tuple[Tensor, Tensor]] = []
    with _until_stopped(probed, box):
        call(*args, **kwargs)
    if not box:
        raise UnsupportedError(
            f"{getattr(call, '__qualname__', call)} did not attend through transformers' attention functions, so it "
            "cannot be probed; use a method that does not look at attention there."
        )
    return box[0]


def only_show(call: Callable[..., Any], *args: Any, **kwargs: Any) -> None:
    """Run a block or layer whose attention is tapped and called once: the listener is shown it, then the call ends."""
    with _until_stopped(_only_shown, True):
        call(*args, **kwargs)


@contextmanager
def _until_stopped(mode: ContextVar[Any], value: Any) -> Iterator[None]:
    """A call in this mode, which may end by `Stop`."""
    token = mode.set(value)
    try:
        yield
    except Stop:
        pass
    finally:
        mode.reset(token)


def scaling_of(attention: nn.Module, q: Tensor) -> float:
    """What an attention module multiplies its logits with."""
    return getattr(attention, "scaling", None) or getattr(attention, "scale", None) or q.shape[-1] ** -0.5
