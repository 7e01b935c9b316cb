"""What a server takes: bounds of requests, of the queue and of compression."""

from __future__ import annotations

from dataclasses import dataclass, field, fields

from winnow.core.budget import Budget
from winnow.core.errors import WinnowError
from winnow.media import Limits
from winnow.video import VideoLimits

MIB = 2**20
LOOPBACK = ("localhost", "127.0.0.1", "::1")


@dataclass(frozen=True)
class Settings:
    """Bounds of a server.

    Attributes:
        name: of the model, as requests say it.
        hosts: values of the Host header that are answered, without port.
        methods: slugs that the plan of a request may name.
        least, most: what a budget of a request's plan may keep, of each picture.
        context: tokens of a conversation and its answer, before compression.
        max_tokens: of an answer; also what an answer has at most where the request does not say.
        temperature: of requests that say none.
        batch: requests that are decoded together.
        bucket: prompts whose compressed lengths fall into one multiple of this number are decoded together.
        waiting: requests that are read, wait or are answered, beside a batch; more are told to come back.
        connections: that are open at once.
        body, buffered: bytes of one body, and of all that are being read.
        values: commas and brackets of a body, which bound what its JSON costs.
        text: characters of all texts of a request.
        pictures: of a request.
        picture: limits of each picture.
        frames: that are taken of a video, evenly.
        video: limits of a video.
        body_seconds, header_seconds: until a body, and a request's head, must have come.
        seconds: from the first byte of a request to the last of its answer.
        grace: seconds that running requests have after SIGTERM.
    """

    name: str
    hosts: tuple[str, ...] = LOOPBACK
    methods: tuple[str, ...] = ()
    least: Budget = Budget(1)
    most: Budget = Budget("100%")
    context: int = 4096
    max_tokens: int = 1024
    temperature: float = 0.0
    batch: int = 8
    bucket: int = 32
    waiting: int = 64
    connections: int = 512
    body: int = 32 * MIB
    buffered: int = 256 * MIB
    values: int = 100_000
    text: int = 200_000
    pictures: int = 8
    picture: Limits = field(default_factory=lambda: Limits(max_total_pixels=64_000_000))
    frames: int = 8
    video: VideoLimits = field(default_factory=lambda: VideoLimits(max_bytes=32 * MIB, max_frames=64, timeout=20.0))
    body_seconds: float = 30.0
    header_seconds: float = 10.0
    seconds: float = 600.0
    grace: float = 20.0

    def __post_init__(self) -> None:
        for own in fields(self):
            value = getattr(self, own.name)
            if own.type in ("int", "float") and own.name not in ("temperature", "grace") and not value > 0:
                raise WinnowError(f"{own.name}={value!r}; give a number above 0.")
        if not 0 <= self.temperature <= 2:
            raise WinnowError(f"temperature={self.temperature!r}; give a number from 0 to 2.")
        if self.grace < 0:
            raise WinnowError(f"grace={self.grace!r}; give seconds, from 0.")

    @property
    def open_requests(self) -> int:
        """Chat requests that are read, wait or are answered at once."""
        return self.waiting + self.batch
