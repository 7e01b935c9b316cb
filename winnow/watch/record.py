"""What was watched and answered, as it is shown and as it is told to programs."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from winnow.engine.stream_ledger import StreamLedger

SHOWN = 8  # of the newest reads


@dataclass(frozen=True)
class Read:
    """What one reading of frames gave.

    Attributes:
        frame: the last frame of the file that was read, from 0.
        time: of it, in seconds.
        given, kept: tokens of the frames, before and after they were shortened.
        held: slots of a head of the cache, mean over layers and heads.
        kv_bytes: of the cache.
        ms: that reading took.
    """

    frame: int
    time: float
    given: int
    kept: int
    held: float
    kv_bytes: int
    ms: float


@dataclass(frozen=True)
class Answer:
    """An answer.

    Attributes:
        time: of the last frame that was read before it, in seconds.
        truth: the right one, where it is known.
        ms: from the question to the last token.
    """

    time: float
    question: str
    answer: str
    truth: str | None
    ms: float


@dataclass(eq=False)
class Record:
    """All answers, the newest reads, and totals; frames do not make it grow.

    Attributes:
        heads: KV heads of a layer.
        frames: that were taken from the video.
        last: of them, which of the file it was, and its time in seconds.
    """

    heads: int
    frames: int = 0
    last: tuple[int, float] = (0, 0.0)
    reads: deque[Read] = field(default_factory=lambda: deque(maxlen=SHOWN))
    answers: list[Answer] = field(default_factory=list)
    ms: float = 0.0
    given: int = 0
    kept: int = 0

    def read(self, ledger: StreamLedger) -> None:
        """Note what a session has read just now."""
        given, kept = ledger.given - self.given, ledger.kept - self.kept
        self.given, self.kept = ledger.given, ledger.kept
        self.ms += ledger.feed_ms
        self.reads.append(Read(*self.last, given, kept, self.held(ledger.held), ledger.kv_bytes, ledger.feed_ms))

    def held(self, by_layer: Sequence[int]) -> float:
        return sum(by_layer) / max(1, self.heads * len(by_layer))

    def facts(self) -> dict[str, Any]:
        """As plain values, for JSON."""
        newest = self.reads[-1] if self.reads else None
        return {
            "frames": self.frames,
            "seconds": self.last[1],
            "tokens": {"given": self.given, "kept": self.kept, "held": None if newest is None else newest.held},
            "kv_bytes": None if newest is None else newest.kv_bytes,
            "ms_per_frame": self.ms / self.frames if self.frames else None,
            "answers": [asdict(answer) for answer in self.answers],
        }
