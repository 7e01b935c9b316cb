"""One forward through the model's seams: what was called, which items it holds, and what it leaves behind."""

from __future__ import annotations

import functools
import inspect
import sys
import threading
from collections.abc import Iterator
from contextvars import ContextVar
from types import FrameType
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from winnow.core.errors import UnsupportedError, WinnowError
from winnow.core.packing import Packing
from winnow.engine.cache import CacheState, check_layers, state_of
from winnow.engine.chunk import Chunk
from winnow.engine.current import chunk_now
from winnow.engine.items import Item, find_items
from winnow.engine.record import write_ledger
from winnow.engine.spans import question_span

if TYPE_CHECKING:
    from winnow.engine.attach import Engine


class Forward:
    """The hooks of the base model, of the language model and of its layers."""

    def __init__(self, engine: Engine) -> None:
        self.engine = engine
        self._code = inspect.unwrap(type(engine.base).forward).__code__
        self._called: ContextVar[dict[str, Any] | None] = ContextVar("winnow_called", default=None)

    def base_enter(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Note what this forward was called with; later turns on a reduced cache get their 3-D positions."""
        engine = self.engine
        chunk_now.set(None)
        engine.running[threading.get_ident()] = threading.current_thread()
        names = _parameters(type(module))  # type: ignore[arg-type]
        kwargs = {**dict(zip(names, args, strict=False)), **kwargs}
        outputs = kwargs.get("mm_encoder_outputs") or {}
        encodings = {m: o._winnow for m, o in outputs.items() if getattr(o, "_winnow", None) is not None}
        foreign = [m for m, o in outputs.items() if o is not None and m not in encodings]
        if foreign and engine.active().plan.methods:
            raise WinnowError(
                f"mm_encoder_outputs[{foreign[0]!r}] was made before the model was compressed; "
                "pass the pixels instead, or encode under the plan."
            )
        state = state_of(kwargs.get("past_key_values"))
        if state is not None and state.engine.model is engine.model:
            state.engine = engine  # detached and compressed again in between
        if engine.clock.on:
            if not encodings and state is None:
                engine.clock.restart()
            engine.clock.start("decode" if _held(kwargs.get("past_key_values")) else "prefill")
        if state is not None and engine.info.mrope:
            kwargs["position_ids"] = _mrope_positions(state, kwargs)
        self._called.set({**kwargs, "encodings": encodings})
        return (), kwargs

    def encoded(self, modality: str, encoding: Any) -> None:
        """The encoder ran inside this forward."""
        called = self._called.get()
        if called is not None:
            called["encodings"][modality] = encoding

    def base_leave(self, module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        """Also after an exception: nothing of this forward stays behind."""
        chunk = chunk_now.get()
        if output is not None and chunk is not None and chunk.items:
            write_ledger(self.engine, chunk)
        chunk_now.set(None)
        self._called.set(None)
        self.engine.running.pop(threading.get_ident(), None)
        self.engine.clock.stop()

    def lm_enter(self, module: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
        """Build the chunk, if there is anything to do: items to reduce, or a cache that holds a reduced prompt."""
        called = self._called.get()
        chunk_now.set(None)
        embeds = kwargs.get("inputs_embeds")
        self._called.set(None)
        if called is None or embeds is None or not self.inside():
            return
        cache = kwargs.get("past_key_values")
        compiled = self.engine.active()
        if not called["encodings"] and state_of(cache) is None:
            self._check_no_placeholders(called.get("input_ids"))
            return
        if compiled.plan.methods:
            check_training(self.engine.model)
            if cache is not None:
                check_layers(cache)
        rows, length = embeds.shape[:2]
        given = called.get("attention_mask")
        if given is not None and (not isinstance(given, Tensor) or given.ndim != 2):
            raise UnsupportedError("compression takes a 2-D attention_mask (1 real, 0 padding); got a prepared mask.")
        mask, sizes, right = _chunk_mask(given, rows, length, embeds.device)
        items: list[Item] = []
        questions: list[tuple[int, int]] = []
        ends = [0] * rows
        if called["encodings"]:
            items, ends, questions = self._items(called, given, sizes, length, right, embeds.device)
        before = 0 if cache is None else cache.get_seq_length()
        past = given[:, :before].bool() if given is not None and before and state_of(cache) is None else None
        packing = Packing.of(mask, sizes, right)
        chunk = Chunk(
            self.engine, compiled, packing, cache, past_mask=past, items=items, questions=questions, ends=ends
        )
        chunk.positions = kwargs.get("position_ids")
        if chunk.positions is None:
            chunk.positions = torch.arange(before, before + length, device=embeds.device)[None]
        chunk_now.set(chunk)

    def _check_no_placeholders(self, ids: Tensor | None) -> None:
        """Placeholders without pictures would be read as words; a prompt that is prefilled in chunks comes so."""
        if ids is None or ids.shape[1] == 1 or not self.engine.active().plan.methods:
            return
        for _, modality, name in self.engine.family.encoders:
            count = int((ids == getattr(self.engine.model.config, name)).sum())
            if count:
                raise UnsupportedError(
                    f"the prompt holds {count} {modality} placeholders, but no {modality} came with it. "
                    "Pass the pixels; a prompt that is prefilled in chunks (prefill_chunk_size) is not supported."
                )

    def _items(
        self, called: dict[str, Any], mask: Tensor | None, sizes: tuple[int, ...], length: int, right: bool, device: Any
    ) -> tuple[list[Item], list[int], list[tuple[int, int]]]:
        ids = called.get("input_ids")
        if ids is None:
            raise WinnowError(
                "compression finds pictures by the placeholders in input_ids; got inputs_embeds only. Pass input_ids."
            )
        ids = ids.cpu()
        items: list[Item] = []
        ends = [0] * ids.shape[0]
        for modality, encoding in called["encodings"].items():
            if encoding.plan is not self.engine.active():
                raise WinnowError("these encoder outputs were made under another plan; encode again under this one.")
            name = next(token for _, m, token in self.engine.family.encoders if m == modality)
            own, last = find_items(ids, getattr(self.engine.model.config, name), encoding, device)
            items = sorted([*items, *own], key=lambda item: (item.row, item.start))
            ends = [max(a, b) for a, b in zip(ends, last, strict=True)]
        spans = self.engine.spans.get()
        if spans is not None and len(spans) not in (1, len(ends)) and len(ends) % len(spans):
            raise WinnowError(f"spans: got {len(spans)} for a batch of {len(ends)} samples.")
        questions = []
        for row, end in enumerate(ends):
            if spans is not None:
                span = spans[row * len(spans) // len(ends)]
                if span[1] > length:
                    raise WinnowError(f"spans: {span} ends behind the prompt of {length} tokens.")
                questions.append(span)
            else:
                stop = sizes[row] if right else length
                questions.append(question_span(ids[row], end, stop, self.engine.suffix))
        return items, ends, questions

    def layer_enter(self, index: int, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Before a layer. Hidden states stay positional: hooks that record them read the first argument."""
        chunk = chunk_now.get()
        if chunk is None or chunk.engine is not self.engine or not self.inside():
            return None
        hidden = args[0] if args else kwargs.pop("hidden_states")
        hidden = chunk.layer(index, hidden, kwargs)
        return (hidden, *args[1:]), kwargs

    def inside(self) -> bool:
        """Whether the base model's forward is on the stack.

        No hook runs when a forward ends with a KeyboardInterrupt. What it left in the context must not touch a part of
        the model that is called by itself afterwards.
        """
        return any(frame.f_code is self._code for frame in callers(sys._getframe(1)))

    def lm_leave(self, module: nn.Module, args: Any, kwargs: Any, output: Any) -> Any:
        """Give outputs their logical length back."""
        chunk = chunk_now.get()
        if chunk is None or chunk.engine is not self.engine or not self.inside():
            return None
        if isinstance(output, tuple):
            return (chunk.finish(output[0]), *output[1:])
        output["last_hidden_state"] = chunk.finish(output.last_hidden_state)
        states = getattr(output, "hidden_states", None)
        if states is not None:
            packings = [chunk.layer_packings[max(0, i - 1)] for i in range(len(states))]
            output["hidden_states"] = tuple(chunk.logical(h, p) for h, p in zip(states, packings, strict=True))
        return output


def callers(frame: FrameType | None) -> Iterator[FrameType]:
    """A frame of the stack, its caller, and so on."""
    while frame is not None:
        yield frame
        frame = frame.f_back


def check_training(model: Any) -> None:
    """Refuse gradient checkpointing, which runs layers again in the backward pass, outside any request."""
    if model.training and getattr(model, "is_gradient_checkpointing", False):
        raise UnsupportedError(
            "compression does not run with gradient checkpointing: layers would be reduced twice. "
            "Call model.gradient_checkpointing_disable(), or train without compression."
        )


@functools.cache
def _parameters(kind: type) -> tuple[str, ...]:
    return tuple(name for name in inspect.signature(kind.forward).parameters if name != "self")  # type: ignore[attr-defined]


def _held(cache: Any) -> bool:
    return cache is not None and cache.get_seq_length() > 0


def _chunk_mask(
    given: Tensor | None, rows: int, length: int, device: torch.device
) -> tuple[Tensor, tuple[int, ...], bool]:
    """`[B, S]` real tokens of the chunk, their numbers on the host, and whether padding stands on the right.

    A decoded token is real, so that decoding never asks the device.
    """
    if given is None or length == 1:
        return torch.ones(rows, length, dtype=torch.bool, device=device), (length,) * rows, False
    mask = given[:, -length:].to(device).bool()
    host = mask.cpu()
    right = bool(host[:, 0].all()) and not bool(host[:, -1].all())
    return mask, tuple(host.sum(1).tolist()), right


def _mrope_positions(state: CacheState, kwargs: dict[str, Any]) -> Any:
    """`[3, B, q]` positions of new text behind a reduced prompt, from the request's own deltas.

    The model keeps the deltas on the module, where another request may have overwritten them.
    """
    given = kwargs.get("position_ids")
    if (
        state.rope_deltas is None
        or state.real is None
        or (given is not None and not (given.ndim == 3 and given.shape[0] == 1))
    ):
        return given
    new = kwargs.get("input_ids")
    new = kwargs.get("inputs_embeds") if new is None else new
    text = state.real[:, None] + torch.arange(new.shape[1], device=state.real.device)  # type: ignore[union-attr]
    return (text + state.rope_deltas)[None].expand(3, -1, -1)
