"""StreamLedger: what a stream has read, and what of it is held."""

from dataclasses import dataclass, field

from winnow.core.ledger import Ledger


@dataclass
class StreamLedger:
    """Totals of a session; its size does not grow with the stream.

    Attributes:
        plan: as each frame is read under it.
        frames: that were fed; of a clip that the model's tower reads as one, as many as have tokens of their own.
        given: content tokens that the tower gave of them.
        kept: those that entered the language model.
        text: all other tokens between them, separators included.
        time: of the last frame, where it was told.
        held: by LM layer, the slots of all heads that the cache holds now.
        kv_bytes: of the cache now.
        questions: that were answered.
        feed_ms: how long the last frame took; first_token_ms, answer_ms: the last answer, from the question to its
            first and to its last token.
        times: milliseconds by phase (encoder, select, prefill), summed over the stream, where timing is on.
    """

    plan: str
    frames: int = 0
    given: int = 0
    kept: int = 0
    text: int = 0
    time: float | None = None
    held: tuple[int, ...] = ()
    kv_bytes: int = 0
    questions: int = 0
    feed_ms: float = 0.0
    first_token_ms: float = 0.0
    answer_ms: float = 0.0
    times: dict[str, float] = field(default_factory=dict)

    def add(self, part: Ledger, tokens: int, time: float | None) -> None:
        """Note a part of the stream.

        Args:
            part: what became of its frames.
            tokens: of the part, as it was given.
        """
        spent = {name: self.times.get(name, 0.0) + more for name, more in part.times.items()}
        self.times = self.times | spent  # never changed in place: a copy of the ledger is what it was
        for item in part.items:
            self.frames += int(item.layout.place[:, 1].max()) + 1
            self.given += item.n_visual
            self.kept += len(item.ids)  # type: ignore[arg-type]
            tokens -= item.n_visual
        self.text += tokens
        self.time = self.time if time is None else time

    def __str__(self) -> str:
        return (
            f"StreamLedger({self.plan}; {self.frames} frames; content tokens {self.kept}/{self.given}; "
            f"{sum(self.held):,} slots, {self.kv_bytes:,} bytes held)"
        )
