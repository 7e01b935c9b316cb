"""The routes: chat completions, models, health and metrics."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator, Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse, Response, StreamingResponse
from starlette.exceptions import HTTPException

from winnow.serve import replies
from winnow.serve.body import Buffered, Gone, read_body
from winnow.serve.engine import Engine
from winnow.serve.errors import ApiError, busy, internal, invalid, stopping
from winnow.serve.guard import Guard, answer_of, of_status
from winnow.serve.job import Done, Event, Failed, Job, Started, Text
from winnow.serve.metrics import Metrics
from winnow.serve.reading import Reader
from winnow.serve.settings import Settings


class Service:
    """The state of one server, and what its routes do.

    Attributes:
        draining: whether the server is about to stop, and takes no more requests.
    """

    def __init__(self, settings: Settings, reader: Reader, engine: Engine, metrics: Metrics) -> None:
        self.settings, self.reader, self.engine, self.metrics = settings, reader, engine, metrics
        self.draining = False
        self.created = int(time.time())
        self._open = 0
        self._buffered = Buffered(settings.buffered)
        # One thread: pictures are decoded one request at a time, which bounds memory.
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="winnow-reader")

    async def health(self) -> Response:
        good = not self.draining and not self.engine.broken
        said = "ok" if good else "broken" if self.engine.broken else "stopping"
        return JSONResponse({"status": said}, 200 if good else 503)

    async def numbers(self) -> Response:
        return Response(self.metrics.text(), media_type=self.metrics.content_type)

    async def models(self) -> Response:
        return JSONResponse(replies.models(self.settings.name, self.created))

    async def model(self, name: str) -> Response:
        if name != self.settings.name:
            raise invalid("This server has no such model; /v1/models names what it has.", None, "model_not_found", 404)
        return JSONResponse(replies.model(name, self.created))

    async def chat(self, request: Request) -> Response:
        if self.draining or self.engine.broken:
            raise stopping()
        if self._open >= self.settings.open_requests:
            raise busy(f"{self._open} requests wait or are answered")
        self._open += 1
        held = contextlib.ExitStack()
        held.callback(self._leave)
        try:
            return await self._chat(request, held)
        finally:
            held.close()  # a stream has taken what it needs into its own stack

    def _leave(self) -> None:
        self._open -= 1

    async def _chat(self, request: Request, held: contextlib.ExitStack) -> Response:
        loop, events = asyncio.get_running_loop(), asyncio.Queue[Event]()
        number = request.scope["state"]["number"]

        def tell(event: Event) -> None:
            with contextlib.suppress(RuntimeError):  # the loop has ended, and with it who would listen
                loop.call_soon_threadsafe(events.put_nowait, event)

        with self._buffered.share() as share:
            body = await read_body(request, self.settings, share)
            asked, job = await loop.run_in_executor(self._pool, self.reader.read, body, tell, number)
            del body
        held.callback(self._give_up, job)
        self.engine.submit(job)
        answer = self._events(job, events)
        gone = asyncio.ensure_future(_gone(request))
        held.callback(gone.cancel)
        reply = replies.Reply(number, self.settings.name, asked.include_usage)
        started = await _unless(gone, anext(answer))
        if asked.stream:
            gone.cancel()  # the response listens for itself
            return _Stream(_chunks(reply, started, answer), held.pop_all())
        return JSONResponse(await _unless(gone, _whole(reply, started, answer)))

    def _give_up(self, job: Job) -> None:
        """The request is over; if its answer is not, its client has left."""
        if not job.over:
            self.metrics.left.inc()
            job.cancel()

    async def _events(self, job: Job, events: asyncio.Queue[Event]) -> AsyncIterator[Started | Text | Done]:
        """What the engine tells of a job, to its end; a failure is raised."""
        while True:
            event = await events.get()
            now = time.monotonic()
            if isinstance(event, Failed):
                raise event.error
            if isinstance(event, Started):
                self.metrics.started(job, event, now)
            yield event
            if isinstance(event, Done):
                self.metrics.done(job, event, now)
                return


class _Stream(StreamingResponse):
    """A stream that gives back what its request held, also where its client left before the first chunk."""

    def __init__(self, chunks: AsyncIterator[bytes], held: contextlib.ExitStack) -> None:
        super().__init__(chunks, media_type="text/event-stream")
        self._held = held

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        with self._held:
            await super().__call__(scope, receive, send)


async def _chunks(
    reply: replies.Reply, started: Started, answer: AsyncIterator[Started | Text | Done]
) -> AsyncIterator[bytes]:
    yield reply.chunk({"role": "assistant", "content": ""})
    try:
        async for event in answer:
            if isinstance(event, Text):
                yield reply.chunk({"content": event.piece})
            elif isinstance(event, Done):
                yield reply.chunk({}, event.reason)
                if reply.include_usage:
                    yield reply.last(started, event)
                yield replies.END
    except ApiError as error:
        yield replies.failure(error)


async def _whole(
    reply: replies.Reply, started: Started, answer: AsyncIterator[Started | Text | Done]
) -> dict[str, Any]:
    pieces: list[str] = []
    async for event in answer:
        if isinstance(event, Text):
            pieces.append(event.piece)
        elif isinstance(event, Done):
            done = event
    return reply.whole("".join(pieces), started, done)


async def _gone(request: Request) -> None:
    """Ends when the client has left."""
    while (await request.receive())["type"] != "http.disconnect":
        pass


async def _unless(gone: asyncio.Future[None], work: Any) -> Any:
    """The result of `work`, which is given up when the client leaves."""
    task = asyncio.ensure_future(work)
    try:
        await asyncio.wait({gone, task}, return_when=asyncio.FIRST_COMPLETED)
        if not task.done():
            raise Gone
        return task.result()
    finally:
        task.cancel()


def make_app(service: Service, keys: list[str]) -> Guard:
    """The application, with its guard."""
    app = FastAPI(openapi_url=None, docs_url=None, redoc_url=None, redirect_slashes=False)
    routes: list[tuple[str, str, Callable[..., Any]]] = [
        ("GET", "/health", service.health),
        ("GET", "/metrics", service.numbers),
        ("GET", "/v1/models", service.models),
        ("GET", "/v1/models/{name:path}", service.model),
        ("POST", "/v1/chat/completions", service.chat),
    ]
    for verb, path, what in routes:
        app.add_api_route(path, what, methods=[verb], response_model=None)

    async def failed(_: Any, error: Exception) -> Response:
        return answer_of(_told(error))

    for kind in (HTTPException, ApiError, Gone, Exception):
        app.add_exception_handler(kind, failed)

    def answered(status: int) -> None:
        service.metrics.answers.labels(str(status) if status else "left").inc()

    return Guard(app, service.settings, keys, answered)


def _told(error: Exception) -> ApiError:
    if isinstance(error, ApiError):
        return error
    if isinstance(error, HTTPException):
        return of_status(error.status_code)
    if isinstance(error, Gone):  # nobody reads it
        return ApiError("The client left.", status=499)
    return internal()
