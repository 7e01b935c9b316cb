"""Handle: what `compress` returns."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from winnow.core.errors import WinnowError
from winnow.core.ledger import Ledger
from winnow.core.method import Method
from winnow.core.plan import FULL, Plan
from winnow.engine.attach import Engine
from winnow.engine.spans import checked_spans


class Handle:
    """A compressed model. Use it as a context manager, or until `detach()`.

    The plan that is attached is seen by all threads, a streamer's included; `using` overrides it in one context.
    """

    def __init__(self, engine: Engine) -> None:
        self._engine = engine

    @property
    def model(self) -> Any:
        """The model itself; call it as ever."""
        return self._engine.model

    @property
    def plan(self) -> Plan:
        """The plan that holds in this context."""
        return self._engine.active().plan

    @property
    def info(self) -> Any:
        """What winnow knows of the model."""
        return self._engine.info

    @property
    def attached(self) -> bool:
        return self._engine.attached

    @property
    def last(self) -> Ledger | None:
        """The ledger of the most recent request, whichever thread ran it."""
        return self._engine.last

    @property
    def last_here(self) -> Ledger | None:
        """The ledger of the most recent request of this thread or task."""
        return self._engine.last_here.get()

    @property
    def timing(self) -> bool:
        """Whether ledgers carry times; each phase is then synchronised with the device, which costs time itself."""
        return self._engine.clock.on

    @timing.setter
    def timing(self, on: bool) -> None:
        self._engine.clock.on = bool(on)

    @contextmanager
    def using(
        self, plan: str | Plan | Method | None = FULL, *, spans: Sequence[tuple[int, int]] | None = None
    ) -> Iterator[Handle]:
        """Another plan in this context only: this thread, this task. A thread that is started inside does not see it.

        Args:
            plan: `"full"` or None is the model without compression.
            spans: (start, end) of the question's tokens for each sample, padding included, where the default (text
                behind the last picture, less what the chat template adds) is not the question.
        """
        engine = self._engine
        if not engine.attached:
            raise WinnowError("this handle is detached; call winnow.compress again.")
        compiled = engine.compiled(Plan.of(FULL if plan is None else plan))
        tokens = engine.override.set(compiled), engine.spans.set(checked_spans(spans))
        try:
            yield self
        finally:
            engine.override.reset(tokens[0])
            engine.spans.reset(tokens[1])

    def detach(self) -> None:
        """Leave the model as it was. Raises while another thread is inside the model; a second call does nothing."""
        self._engine.detach()

    def __enter__(self) -> Handle:
        return self

    def __exit__(self, *exception: object) -> None:
        self.detach()

    def __repr__(self) -> str:
        state = "attached" if self.attached else "detached"
        return f"Handle({type(self.model).__name__}, {str(self._engine.default.plan)!r}, {state})"
