"""The routes of the studio: its page, and what the page calls."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from importlib.resources import files
from typing import Any

import torch
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import HTMLResponse, JSONResponse, Response
from starlette.routing import Route

from winnow import __version__
from winnow.core.errors import WinnowError
from winnow.engine.compress import DEFAULT
from winnow.serve.body import Buffered, Gone, parse_json, read_body
from winnow.serve.errors import ApiError, busy, internal, invalid, no_memory, told
from winnow.serve.guard import answer_of, of_status
from winnow.serve.settings import Settings
from winnow.studio.answering import Asker, look
from winnow.studio.asking import asked_of, picture_of
from winnow.studio.guard import REPORT, StudioGuard
from winnow.studio.stores import Stores

KINDS = {"html": "text/html", "css": "text/css", "js": "text/javascript"}


class Studio:
    """The state of one studio, and what its routes do."""

    def __init__(self, settings: Settings, asker: Asker, stores: Stores) -> None:
        self.settings, self.asker, self.stores = settings, asker, stores
        self.methods = asker.methods()
        self._open = 0
        self._buffered = Buffered(settings.buffered)
        # One thread has the model; one opens pictures and stores, which bounds memory.
        self._model = ThreadPoolExecutor(1, thread_name_prefix="winnow-studio")
        self._reader = ThreadPoolExecutor(1, thread_name_prefix="winnow-studio-reader")

    async def about(self, request: Request) -> Response:
        return JSONResponse(
            {
                "version": __version__,
                "model": self.asker.name,
                "methods": self.methods,
                "default": DEFAULT,
                "stores": self.stores.names,
            }
        )

    async def look(self, request: Request) -> Response:
        given = await self._body(request)
        return await self._done(self._reader, lambda: look(picture_of(given, self.settings.picture)))

    async def answer(self, request: Request) -> Response:
        given = await self._body(request)
        return await self._done(self._model, lambda: self.asker.answer(asked_of(given, self.settings)))

    async def report(self, request: Request) -> Response:
        name = (await self._body(request)).get("store")
        if not isinstance(name, str):
            raise invalid("store must be one of the names that the studio lists.", "store")
        return await self._done(self._reader, lambda: {"path": REPORT + self.stores.open(name)})

    async def shown(self, request: Request) -> Response:
        html = self.stores.page(request.path_params["word"])
        if html is None:
            raise of_status(404)
        return HTMLResponse(html)

    async def _body(self, request: Request) -> dict[str, Any]:
        with self._buffered.share() as share:
            return parse_json(await read_body(request, self.settings, share), self.settings.values)

    async def _done(self, pool: ThreadPoolExecutor, work: Callable[[], dict[str, Any]]) -> Response:
        """What a thread makes of a request; more than it may hold are told to come back."""
        if self._open >= self.settings.waiting:
            raise busy(f"{self._open} requests wait or are answered")
        self._open += 1
        try:
            return JSONResponse(await asyncio.get_running_loop().run_in_executor(pool, work))
        finally:
            self._open -= 1


def make_app(studio: Studio, key: str) -> StudioGuard:
    """The application, with its guard."""
    routes = [
        Route("/api/about", studio.about),
        Route("/api/look", studio.look, methods=["POST"]),
        Route("/api/answer", studio.answer, methods=["POST"]),
        Route("/api/report", studio.report, methods=["POST"]),
        Route(REPORT + "{word}", studio.shown),
        *(Route("/" if name == "index.html" else f"/{name}", _constant(text, kind)) for name, text, kind in _assets()),
    ]
    kinds = (HTTPException, ApiError, WinnowError, Gone, Exception)
    return StudioGuard(
        Starlette(routes=routes, exception_handlers=dict.fromkeys(kinds, _failed)), studio.settings, [key]
    )


def _assets() -> list[tuple[str, str, str]]:
    """Name, text and type of the files of the page."""
    found = []
    for file in (files("winnow") / "studio" / "page").iterdir():
        suffix = file.name.rpartition(".")[2]
        if suffix in KINDS:
            found.append((file.name, file.read_text(encoding="utf-8"), KINDS[suffix]))
    return found


def _constant(text: str, kind: str) -> Callable[[Request], Any]:
    async def give(request: Request) -> Response:
        return Response(text, media_type=kind)

    return give


async def _failed(_: Any, error: Exception) -> Response:
    return answer_of(_said(error))


def _said(error: Exception) -> ApiError:
    if isinstance(error, ApiError):
        return error
    if isinstance(error, HTTPException):
        return of_status(error.status_code)
    if isinstance(error, Gone):  # nobody reads it
        return ApiError("The client left.", status=499)
    if isinstance(error, WinnowError):
        return invalid(told(error))
    if isinstance(error, MemoryError | torch.OutOfMemoryError):
        return no_memory()
    return internal()
