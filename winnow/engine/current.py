"""What is running in this thread or task: the encoder call and the forward that hooks and taps belong to."""

from __future__ import annotations

from contextvars import ContextVar
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from winnow.engine.chunk import Chunk
    from winnow.models.family import Encoding

encoding_now: ContextVar[Encoding | None] = ContextVar("winnow_encoding", default=None)
chunk_now: ContextVar[Chunk | None] = ContextVar("winnow_chunk", default=None)
