"""stream: frames as they arrive, and questions at any time, in memory that the plan bounds.

Each frame is encoded once, shortened by the plan, and read into the cache, which the plan's methods of the cache then
shorten. A question is read and answered on a copy of that cache, so that frames go on as if nobody had asked.
"""

import copy
import threading
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from winnow.core.errors import WinnowError
from winnow.core.method import Method
from winnow.core.plan import Plan
from winnow.engine.clock import now
from winnow.engine.handle import Handle
from winnow.engine.stream_handles import release, shared_handle
from winnow.engine.stream_input import Piece, checked_ids, checked_stamp, checked_times, piece_of, pieces_of
from winnow.engine.stream_ledger import StreamLedger
from winnow.engine.stream_plan import check_family, check_steps, plan_of_stream
from winnow.engine.stream_reader import Reader, let_go
from winnow.engine.stream_words import Words


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
            check_family(self._handle.bound)
            bound = self._handle.bind(plan)
            check_steps(bound)
            self._reader = Reader(self._handle, bound, bounded)
            self._words = None if processor is None else Words.of(processor, self._handle.bound.token_ids["image"])
        except BaseException:
            self.close()
            raise
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
            before = copy.copy(self._reader), copy.copy(self.ledger)
            first = self._reader.cache
            try:
                for piece, moment in zip(pieces, times, strict=True):
                    last = self._reader.cache
                    self._read(self._worded(piece, moment), moment)
                    if last is not first:
                        let_go(last)
            except BaseException:  # an interrupt too
                self._reader, self.ledger = before
                raise
            let_go(first)

    def _read(self, piece: Piece, moment: float | None) -> None:
        begin = self._now()
        part = self._reader.read(piece)
        self.ledger.add(part, piece.ids.shape[1], moment)
        self.ledger.held, self.ledger.kv_bytes = self._reader.held, self._reader.kv_bytes
        self.ledger.feed_ms = self._now() - begin

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
            begin, moments = self._now(), []
            tokens: list[Tensor] = []
            for token in self._reader.answer(ids, max_new_tokens):
                tokens.append(token)
                moments.append(self._now() - begin)
            self.ledger.first_token_ms, self.ledger.answer_ms = moments[0], moments[-1]
            self.ledger.questions += 1
            answer = torch.cat(tokens, 1).cpu()
            return answer if self._words is None else self._words.text(answer[0])

    @property
    def timing(self) -> bool:
        """Whether `ledger.times` grows; each phase then waits for the device. All sessions of a model share it."""
        self._open()
        return self._handle.timing  # type: ignore[union-attr]

    @timing.setter
    def timing(self, on: bool) -> None:
        self._open()
        self._handle.timing = on  # type: ignore[union-attr]

    def close(self) -> None:
        """Let go of the stream; the model is left alone with the last session. A second call does nothing."""
        handle, self._handle = self._handle, None
        self.__dict__.pop("_reader", None)
        if handle is not None:
            release(handle)

    def __enter__(self) -> "Session":
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def _now(self) -> float:
        return now(self._reader.bound.device)

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
