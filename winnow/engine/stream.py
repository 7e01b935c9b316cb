"""stream: frames as they arrive, and questions at any time, in memory that the plan bounds.

Each frame is encoded once, shortened by the plan, and read into the cache, which the plan's methods of the cache then
shorten. A question is read and answered on a copy of that cache, so that frames go on as if nobody had asked.
"""

import copy
import threading
import warnings
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor
from transformers import DynamicCache

from winnow.cache.layer import HeldLayer, held_bytes
from winnow.core.errors import WinnowError, WinnowWarning
from winnow.core.method import Method
from winnow.core.plan import Plan
from winnow.engine.clock import now
from winnow.engine.handle import Handle
from winnow.engine.request import Override
from winnow.engine.stream_handles import release, shared_handle
from winnow.engine.stream_input import Piece, checked_ids, checked_stamp, checked_times, piece_of, pieces_of
from winnow.engine.stream_ledger import StreamLedger
from winnow.engine.stream_plan import check_family, check_steps, keeps_distances, most_slots, plan_of_stream
from winnow.engine.stream_words import Words
from winnow.engine.versions import cache_keyword


def stream(
    model: Any,
    plan: str | Plan | Method,
    processor: Any = None,
    *,
    positions: str | None = None,
    bounded: bool = True,
    stamp: str | None = None,
) -> "Session":
    """A session of one stream: `session.feed(frame)`, `session.ask("…")` at any time, `session.close()`.

    Args:
        model: a vision-language model with 1-D or 3-D positions that is supported in streams. Outside of sessions it
            answers as before; several sessions may share it.
        plan: as `compress` takes it. Its methods of pictures see one frame at a time, and those that remember a stream
            (`stc`) are told of earlier ones. A method of the cache bounds what is held after each frame:
            `"stc:keep=60 + snapkv:keep=4096"`.
        processor: then frames are pictures, and questions and answers are text, in the words of its chat template for
            a message of many pictures. Without it, frames and questions are what a processor makes of them.
        positions: `keep` or `compact`; overrides the plan's.
        bounded: refuse plans whose cache grows with each frame. Off, memory and time grow.
        stamp: what is written before each frame, as in `"{time:.1f}s: "`; `feed` is then told the time.

    Raises:
        UnsupportedError: the model, or a method in a stream; with what does work.
        WinnowError: the plan cannot be read, or does not bound the cache.
    """
    return Session(model, Plan.of(plan, positions=positions), processor, bounded=bounded, stamp=stamp)


class Session:
    """One stream. Made by `stream`; a context manager that closes at its end. Calls from several threads take turns.

    A call that fails or is interrupted leaves the session as it was before it.
    """

    def __init__(self, model: Any, plan: Plan, processor: Any, *, bounded: bool, stamp: str | None) -> None:
        plan = plan_of_stream(plan, bounded)
        self._stamp = checked_stamp(stamp, processor)
        self._lock = threading.Lock()
        self._handle: Handle | None = shared_handle(model)
        try:
            self._bound, engine = self._handle.bound, self._handle._engine
            check_family(self._bound)
            self._plan = engine.bind(plan)
            check_steps(self._plan)
            self._model = self._bound.model
            self._words = None if processor is None else Words.of(processor, self._bound.token_ids["image"])
        except BaseException:
            self.close()
            raise
        self._cache: Any = DynamicCache(config=self._bound.lm.config)
        self._memory: dict[int, dict[str, Any]] = {}
        self._next = 0
        self._most = most_slots(plan, self._bound) if bounded else None
        self._warned = keeps_distances(plan)
        self.ledger = StreamLedger(str(plan))

    def feed(self, frames: Any, *, time: float | Sequence[float] | None = None) -> None:
        """Read a frame, or several one after the other.

        Args:
            frames: with a processor: a picture (PIL, or `[H, W, 3]` of bytes), or a list of them. Without: what a
                processor makes of the next part of the stream, as `{"input_ids": [1, n], "pixel_values": …}`: frames,
                and text where it belongs.
            time: seconds since the begin of the stream, of each frame; not before that of earlier ones.

        Raises:
            WinnowError: what was given is no frame, or the session is closed.
        """
        with self._lock:
            self._open()
            pieces = [piece_of(frames)] if self._words is None else pieces_of(frames, self._words)
            times = checked_times(time, len(pieces), self.ledger.time)
            before = (self._cache, self._memory, self._next, copy.copy(self.ledger))
            try:
                for piece, moment in zip(pieces, times, strict=True):
                    self._read(self._worded(piece, moment), moment)
            except BaseException:  # an interrupt too
                self._cache, self._memory, self._next, self.ledger = before
                raise

    def ask(self, question: Any, *, max_new_tokens: int = 64) -> Any:
        """The answer to a question about what was fed so far, greedily decoded.

        Args:
            question: text; or, without a processor, token ids `[1, m]` of all that follows the last frame.
            max_new_tokens: of the answer, at most.

        Returns:
            text; or, without a processor, token ids `[1, n]`.

        Raises:
            WinnowError: no frame was fed yet, or the question cannot be read.
        """
        if isinstance(max_new_tokens, bool) or not isinstance(max_new_tokens, int) or max_new_tokens < 1:
            raise WinnowError(f"max_new_tokens={max_new_tokens!r}; give a number from 1.")
        with self._lock:
            self._open()
            if not self.ledger.frames:
                raise WinnowError("no frame was fed yet; feed one before you ask.")
            if self._words is not None:
                if not isinstance(question, str):
                    raise WinnowError(f"a question is text, got {type(question).__name__}.")
                ids = torch.tensor([self._words.question(question)])
            else:
                ids = checked_ids(question)
            begin = now(self._bound.device)
            tokens: list[Tensor] = []
            for token in self._answer(ids.to(self._bound.device), max_new_tokens):
                if not tokens:
                    self.ledger.first_token_ms = now(self._bound.device) - begin
                tokens.append(token)
            self.ledger.answer_ms = now(self._bound.device) - begin
            self.ledger.questions += 1
            answer = torch.cat(tokens, 1).cpu()
            return answer if self._words is None else self._words.text(answer[0])

    def close(self) -> None:
        """Let go of the stream; the model is left alone with the last session. A second call does nothing."""
        handle, self._handle, self._cache = self._handle, None, None
        if handle is not None:
            release(handle)

    def __enter__(self) -> "Session":
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def _open(self) -> None:
        if self._handle is None:
            raise WinnowError("this session is closed; open a new one with winnow.stream.")

    def _worded(self, piece: Piece, moment: float | None) -> Piece:
        """A frame with the words that stand before it."""
        if self._words is None:
            return piece
        words = list(self._words.between if self.ledger.frames else self._words.before)
        if self._stamp is not None:
            if moment is None:
                raise WinnowError(f"stamp={self._stamp!r} writes the time of each frame; give feed(…, time=seconds).")
            words += self._words.plain(self._stamp.format(time=moment))
        return Piece(torch.cat([torch.tensor([words], dtype=torch.int64), piece.ids], 1), piece.rest)

    def _read(self, piece: Piece, moment: float | None) -> None:
        """One forward over a piece of the stream. What is remembered changes only once it is through."""
        device, begin = self._bound.device, now(self._bound.device)
        cache, memory = _fork(self._cache), dict(self._memory)
        ids = piece.ids.to(device)
        given = {name: _moved(value, self._model) for name, value in piece.rest.items()}
        positions = self._positions(ids, given)
        try:
            self._forward(cache, ids, positions, memory, given)
        except ValueError as error:
            if isinstance(error, WinnowError):
                raise
            refused = type(error).__name__  # the model counts placeholders itself, in words of its own
        else:
            refused = None
        if refused is not None:
            raise WinnowError(
                f"{type(self._model).__name__} cannot read this part of the stream ({refused}): its {ids.shape[1]} "
                "tokens need a placeholder for each token of its pixels, and the pixels their grids and sizes."
            )
        ledger = self._handle.last  # type: ignore[union-attr]
        items = () if ledger is None else ledger.items
        if not items:
            raise WinnowError("this part of a stream holds no frame: pass pixels, with a placeholder for each token.")
        held = tuple(map(_slots, cache.layers))
        if self._most is not None and sum(held) > self._most:
            raise WinnowError(
                f"after {self.ledger.frames} frames the cache would hold {sum(held):,} slots: {self._plan.plan} does "
                "not keep to its number in every layer and head when more frames come; use another method of the "
                "cache, such as streaming-llm or snapkv."
            )
        self._cache, self._memory = cache, memory
        self._next += ids.shape[1] if positions is None else int(positions.max()) + 1 - self._next
        self.ledger.add(items, ids.shape[1], moment)
        self.ledger.held = held
        self.ledger.kv_bytes = held_bytes(cache)
        self.ledger.feed_ms = now(device) - begin
        self._warn_of_distances()

    def _answer(self, ids: Int[Tensor, "1 m"], count: int) -> Iterator[Int[Tensor, "1 1"]]:
        cache, place = _fork(self._cache), self._next
        ends = self._model.generation_config.eos_token_id
        ends = set(ends if isinstance(ends, list) else [ends])
        for _ in range(count):
            positions = None
            if self._bound.info.mrope:
                positions = torch.arange(place, place + ids.shape[1], device=ids.device).expand(3, 1, -1)
            place += ids.shape[1]
            ids = self._forward(cache, ids, positions, None, {})[:, -1].argmax(-1, keepdim=True)
            yield ids
            if int(ids) in ends:
                return

    def _forward(
        self, cache: Any, ids: Tensor, positions: Tensor | None, memory: dict[int, dict[str, Any]] | None, given: dict
    ) -> Tensor:
        """Logits `[1, 1, vocabulary]` behind the last token."""
        self._check_attached()
        called = {cache_keyword(self._model): cache, **given}
        with torch.no_grad(), self._handle._engine.overridden(Override(self._plan, None, None, memory)):  # type: ignore[union-attr]
            output = self._model(
                input_ids=ids, position_ids=positions, use_cache=True, logits_to_keep=1, return_dict=True, **called
            )
        logits: Tensor = output.logits
        return logits

    def _check_attached(self) -> None:
        if not self._handle.attached:  # type: ignore[union-attr]
            raise WinnowError("the model was detached from winnow under this session; open a new one.")

    def _positions(self, ids: Tensor, given: dict[str, Tensor]) -> Tensor | None:
        """`[3, 1, n]` positions behind all that was read; None where the model counts them itself.

        They are those of one long prompt: the model's own rule, from where the last part ended.
        """
        if not self._bound.info.mrope:
            return None
        tokens = self._bound.token_ids
        types = sum((number * (ids == tokens[name]).int() for number, name in ((1, "image"), (2, "video"))), 0 * ids)
        given["mm_token_type_ids"] = types.int()
        ones = torch.ones_like(ids)
        found: Tensor = self._model._prepare_position_ids_for_generation(ids, {**given, "attention_mask": ones})
        return found[-3:].expand(3, 1, -1) + self._next

    def _warn_of_distances(self) -> None:
        places = getattr(self._bound.lm.config, "max_position_embeddings", None)
        if self._warned or places is None or self._next <= places:
            return
        self._warned = True
        warnings.warn(
            f"this stream has passed the {places} positions that the model was trained with: what it reads of early "
            "frames lies further away than it has learned. 'streaming-llm:keep=…,shift=true | positions=compact' keeps "
            "all distances within the slots that are held (1-D positions).",
            WinnowWarning,
            stacklevel=4,
        )


def _fork(cache: Any) -> Any:
    """A copy that goes on by itself. Keys of a plain layer are never written in place, and are shared."""
    plain = [layer for layer in cache.layers if not isinstance(layer, HeldLayer)]
    tensors = [getattr(layer, name, None) for layer in plain for name in ("keys", "values")]
    return copy.deepcopy(cache, {id(x): x for x in tensors if x is not None})


def _slots(layer: Any) -> int:
    """Of all heads that a layer holds."""
    if isinstance(layer, HeldLayer):
        return layer.slots_held
    keys = getattr(layer, "keys", None)
    return 0 if keys is None or not keys.numel() else keys.shape[0] * keys.shape[1] * keys.shape[2]


def _moved(value: Tensor, model: Any) -> Tensor:
    return value.to(model.device, model.dtype if value.is_floating_point() else None)
