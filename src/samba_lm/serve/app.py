"""The HTTP application: which path leads where, and what every request passes through."""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import AsyncIterator
from typing import Any, TypeVar

from fastapi import FastAPI, Request, Response
from fastapi.responses import JSONResponse, PlainTextResponse
from pydantic import BaseModel, ValidationError
from starlette.exceptions import HTTPException

from samba_lm import __version__
from samba_lm.engine.engine import Engine
from samba_lm.errors import UserError
from samba_lm.serve import models
from samba_lm.serve.chat import Chat
from samba_lm.serve.completions import Completions, read_prompts
from samba_lm.serve.errors import ApiError, api_error
from samba_lm.serve.jobs import Bridge
from samba_lm.serve.metrics import Metrics
from samba_lm.serve.service import Service
from samba_lm.serve.settings import Settings
from samba_lm.serve.sse import ClientGone, EventStream, while_connected
from samba_lm.serve.templates import PlainTemplate
from samba_lm.serve.words import Words
from samba_lm.validation import explain

M = TypeVar("M", bound=BaseModel)
LONG_BODY = 1 << 16
"""Bytes of JSON that are read on the event loop; more go to a thread."""


def create_app(engine: Engine, settings: Settings) -> FastAPI:
    """The application. The engine is the caller's to close."""

    @contextlib.asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        metrics = Metrics(engine)
        app.state.service = Service(
            engine, settings, metrics, Words(engine.tokenizer), Bridge(engine, metrics), PlainTemplate(engine.tokenizer)
        )
        yield

    app = FastAPI(title="samba-lm", version=__version__, lifespan=lifespan, docs_url=None, redoc_url=None)
    _errors(app)
    _routes(app)
    return app


def _service(request: Request) -> Service:
    service: Service = request.app.state.service
    return service


def _errors(app: FastAPI) -> None:
    @app.exception_handler(ApiError)
    @app.exception_handler(UserError)
    async def known(_: Request, error: Exception) -> Response:
        return api_error(error).response()

    @app.exception_handler(HTTPException)
    async def http(_: Request, error: HTTPException) -> Response:
        return ApiError(error.status_code, str(error.detail), headers=dict(error.headers or {})).response()

    @app.exception_handler(ClientGone)
    async def gone(_: Request, error: Exception) -> Response:
        return Response(status_code=499)  # nobody reads it

    @app.exception_handler(Exception)
    async def defect(request: Request, error: Exception) -> Response:
        logging.getLogger("samba_lm.serve").error("%s failed", request.url.path, exc_info=error)
        return api_error(error).response()


async def read_body(request: Request, kind: type[M]) -> M:
    """A request's JSON. Raises ApiError for what is not, or not of the right kind."""
    if request.headers.get("content-type", "").partition(";")[0].strip().lower() != "application/json":
        raise ApiError(415, "The body must be JSON: send it with Content-Type: application/json.")
    body = await request.body()
    try:
        if len(body) <= LONG_BODY:
            return kind.model_validate_json(body)
        return await asyncio.to_thread(kind.model_validate_json, body)
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False)[0]
        param = str(first["loc"][0]) if first["loc"] else None
        raise ApiError(400, explain(error, kind), param=param) from None


def _routes(app: FastAPI) -> None:
    @app.get("/health")
    async def health(request: Request) -> dict[str, Any]:
        return {"status": "ok"}

    @app.get("/metrics", response_class=PlainTextResponse)
    async def metrics(request: Request) -> Response:
        return PlainTextResponse(_service(request).metrics.text())

    @app.get("/v1/models")
    async def list_models(request: Request) -> models.ModelList:
        return models.ModelList(data=[_model(_service(request))])

    @app.post("/v1/completions")
    async def completions(request: Request) -> Response:
        service = _service(request)
        asked = await read_body(request, models.CompletionRequest)
        service.check_model(asked.model)
        job = Completions(service, asked, await read_prompts(service, asked, None), None)
        if asked.stream:
            return EventStream(job.stream(), job.close)
        try:
            return JSONResponse((await while_connected(request, job.whole())).model_dump())
        finally:
            job.close()

    @app.post("/v1/chat/completions")
    async def chat(request: Request) -> Response:
        service = _service(request)
        asked = await read_body(request, models.ChatRequest)
        service.check_model(asked.model)
        prompt = await asyncio.to_thread(service.template.encode, asked.messages)
        job = Chat(service, asked, prompt, None)
        if asked.stream:
            return EventStream(job.stream(), job.close)
        try:
            return JSONResponse((await while_connected(request, job.whole())).model_dump())
        finally:
            job.close()


def _model(service: Service) -> models.Model:
    config = service.engine.model.config
    return models.Model(
        id=service.settings.model_name,
        created=service.started,
        vocab_size=config.vocab_size,
        parameters=sum(p.numel() for p in service.engine.model.parameters()),
        state_bytes=service.engine.slots.nbytes() // service.engine.slots.capacity,
        constant_state=service.engine.constant,
    )
