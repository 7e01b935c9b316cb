"""What Prometheus reads: requests, tokens before and after compression, batches, times. No label is a client's."""

from __future__ import annotations

from collections.abc import Callable

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, ProcessCollector, generate_latest
from prometheus_client.exposition import CONTENT_TYPE_LATEST

from winnow.serve.job import Done, Job, Started

SECONDS = (0.01, 0.03, 0.1, 0.3, 1, 3, 10, 30, 100, 300)


class Metrics:
    """The numbers of one server.

    Args:
        counts: the jobs that wait, and those that are decoded.
    """

    content_type = CONTENT_TYPE_LATEST

    def __init__(self, counts: Callable[[], tuple[int, int]]) -> None:
        own = self.registry = CollectorRegistry()
        ProcessCollector(registry=own)
        self.answers = Counter("winnow_requests", "Answers, by HTTP status.", ["status"], registry=own)
        self.left = Counter("winnow_clients_left", "Chat requests whose client left.", registry=own)
        self.prompt = Counter("winnow_prompt_tokens", "Prompt tokens that the model got.", registry=own)
        self.given = Counter("winnow_picture_tokens_given", "Tokens of pictures before compression.", registry=own)
        self.kept = Counter("winnow_picture_tokens_kept", "Tokens of pictures that were left.", registry=own)
        self.generated = Counter("winnow_generated_tokens", "Tokens that the model wrote.", registry=own)
        self.first = Histogram(
            "winnow_first_token_seconds", "From a request's end to its first token.", buckets=SECONDS, registry=own
        )
        self.whole = Histogram(
            "winnow_answer_seconds", "From a request's end to its answer's.", buckets=SECONDS, registry=own
        )
        self.rows = Histogram(
            "winnow_batch_rows", "Requests that were decoded together.", buckets=(1, 2, 4, 8, 16, 32, 64), registry=own
        )
        Gauge("winnow_requests_waiting", "Requests that wait.", registry=own).set_function(lambda: counts()[0])
        Gauge("winnow_requests_running", "Requests that are decoded.", registry=own).set_function(lambda: counts()[1])

    def started(self, job: Job, event: Started, now: float) -> None:
        self.first.observe(now - job.born)
        self.prompt.inc(event.prompt)
        self.given.inc(event.given)
        self.kept.inc(event.kept)

    def done(self, job: Job, event: Done, now: float) -> None:
        self.whole.observe(now - job.born)
        self.generated.inc(event.tokens)

    def text(self) -> bytes:
        """All of it, as Prometheus reads it."""
        return generate_latest(self.registry)
