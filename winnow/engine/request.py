"""Request: everything that belongs to one forward of a compressed model, in the one context variable of the engine."""

import asyncio
import threading
import weakref
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor

from winnow.core.entered import Entered
from winnow.core.ledger import Ledger
from winnow.core.sampled import Sampled
from winnow.engine.bound_model import BoundModel
from winnow.engine.bound_plan import BoundPlan
from winnow.engine.clock import Clock
from winnow.engine.encoding import EncoderRecord
from winnow.engine.question import QuestionReader

Spans = tuple[tuple[int, int], ...]


@dataclass(eq=False)
class Attachment:
    """One attachment of plans to a model. Caches remember it: what it reduced must not go on without it.

    Attributes:
        reads: LM layers, and places in them, where rows can read what is beside the sequence.
    """

    bound: BoundModel
    attached: bool = False
    reads: set[tuple[int, str]] = field(default_factory=set)


@dataclass(frozen=True, eq=False)
class Override:
    """What `handle.using` says for one context."""

    plan: BoundPlan
    spans: Spans | None
    placeholders: Tensor | None = None
    videos: tuple[Sampled, ...] | None = None
    prompts: tuple[tuple[Entered, ...], ...] | None = None
    memory: dict[int, dict[str, Any]] | None = None


# What `handle.using` and sessions of a stream say in this context, for each attachment.
_overrides: ContextVar[Mapping[int, Override]] = ContextVar("winnow_overrides", default=MappingProxyType({}))


def override_of(attachment: Attachment) -> Override | None:
    """What holds in this context in the place of the plan that is attached."""
    return _overrides.get().get(id(attachment))


@contextmanager
def overridden(attachment: Attachment, override: Override) -> Iterator[None]:
    """Another plan in this context only."""
    token = _overrides.set({**_overrides.get(), id(attachment): override})
    try:
        yield
    finally:
        _overrides.reset(token)


def _backward_now() -> int:
    """The number of the backward pass that is running on this thread; −1 outside of any."""
    return torch._C._current_graph_task_id()


@dataclass(eq=False)
class Request:
    """One forward through the model, or one call of its encoder from outside a forward.

    Attributes:
        bound: the model.
        attachment: that caches remember.
        plan: that holds in this context.
        spans: the caller's question spans, if there are any.
        suffix: token ids that the chat template puts behind the question; None: unknown.
        clock: of the request.
        train: whether gradients flow through steps.
        called: the arguments of the forward.
        encodings: modality → what was encoded for this forward.
        encoding: the encoder call that is running now.
        lm: the pass through the language model that is running now.
        cross: the same, where pictures are read by cross-attention.
        reached_lm: whether the language model was called.
        positions: with which it was called.
        outputs: modality → what the encoder gave in this forward.
        placeholders: `[B, S]` where the caller's embeddings hold pictures.
        videos: how the frames of its videos were chosen, where the caller says it.
        prompts: how the pictures of each of its rows entered, where the caller says it.
        memory: what methods remember of the stream that this request is a part of, by their number; None: it is none.
        question_from: where the question of a conversation that is read again begins at the earliest.
        uses_layers: whether the layers of the LM are hooked for this request.
        checkpointed: the LM layer that was last changed before its checkpoint.
        ledger: of this request, once its prefill is done.
        backward: the backward pass in which it was made: −1 for none, which is nearly always so.
        reader: tells which tokens of a question count.
    """

    bound: BoundModel
    attachment: Attachment
    plan: BoundPlan
    spans: Spans | None
    suffix: tuple[int, ...] | None
    clock: Clock
    train: bool = False
    called: dict[str, Any] = field(default_factory=dict)
    encodings: dict[str, EncoderRecord] = field(default_factory=dict)
    encoding: EncoderRecord | None = None
    lm: Any = None
    cross: Any = None
    reached_lm: bool = False
    positions: Any = None
    outputs: dict[str, Any] = field(default_factory=dict)
    placeholders: Tensor | None = None
    videos: tuple[Sampled, ...] | None = None
    prompts: tuple[tuple[Entered, ...], ...] | None = None
    memory: dict[int, dict[str, Any]] | None = None
    question_from: int = 0
    uses_layers: bool = False
    checkpointed: int | None = None
    ledger: Ledger | None = None
    backward: int = field(default_factory=_backward_now)
    reader: QuestionReader = field(default_factory=QuestionReader)

    @property
    def runs(self) -> bool:
        """Whether what runs now is part of it, and not a layer that a backward pass inside it runs again."""
        return self.backward == _backward_now()


def listened(request: Request) -> dict[str, int]:
    """The placeholder of each modality whose items the plan sees."""
    return {m: token for m, token in request.bound.token_ids.items() if request.plan.listens(m)}


def padding_mask(request: Request, arguments: dict[str, Any]) -> Any:
    """`[B, L + S]` what the caller says is padding, or None. Models that make masks outside the LM hide it there."""
    return (arguments if request.bound.short else request.called).get("attention_mask")


request_now: ContextVar[Request | None] = ContextVar("winnow_request", default=None)


class Ledgers:
    """The ledger of the latest request: of each thread or task while it lives, and of all."""

    def __init__(self) -> None:
        self._own: weakref.WeakKeyDictionary[Any, Ledger] = weakref.WeakKeyDictionary()
        self._latest: Ledger | None = None
        self._latest_by: Any = None  # a weak reference to its thread or task

    def add(self, ledger: Ledger) -> None:
        here = _here()
        self._own[here] = self._latest = ledger
        self._latest_by = weakref.ref(here)

    @property
    def last(self) -> Ledger | None:
        """That of this thread or task, if it has made a request; else that of whoever made the latest.

        The main thread also sees what a thread did that has ended: it is who starts a thread to stream an answer.
        """
        here = _here()
        own = self._own.get(here)
        if own is None:
            return self._latest
        by = self._latest_by()
        ended = by is None or (isinstance(by, threading.Thread) and not by.is_alive())
        return self._latest if here is threading.main_thread() and ended else own

    @property
    def here(self) -> Ledger | None:
        """That of this thread or task."""
        return self._own.get(_here())


def _here() -> Any:
    try:
        task = asyncio.current_task()
    except RuntimeError:
        task = None
    return threading.current_thread() if task is None else task
