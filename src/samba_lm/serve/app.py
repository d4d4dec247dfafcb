"""The HTTP application: which path leads where."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from typing import Annotated, ParamSpec, Protocol, TypeVar

from fastapi import FastAPI, Query, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.middleware.cors import CORSMiddleware
from fastapi.responses import JSONResponse
from pydantic import BaseModel, ValidationError
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect

from samba_lm import __version__
from samba_lm.contexts.info import check_title
from samba_lm.errors import UserError
from samba_lm.serve import models
from samba_lm.serve.chat import Chat
from samba_lm.serve.completions import Completions, read_prompts
from samba_lm.serve.contexts import Contexts, Reading, encode_long
from samba_lm.serve.errors import ApiError, api_error
from samba_lm.serve.gate import Gate
from samba_lm.serve.openapi import BINARY, EVENTS, JSON, METRICS, describe, document
from samba_lm.serve.schema import grammar_of
from samba_lm.serve.service import Service
from samba_lm.serve.sse import ClientGone, EventStream, Pieces, while_connected
from samba_lm.serve.webpage import mount
from samba_lm.templates import PlainTemplate
from samba_lm.validation import explain

M = TypeVar("M", bound=BaseModel)
P = ParamSpec("P")
T = TypeVar("T")
SHORT_BODY = 1 << 13
"""Bytes of a request that are read and turned into tokens on the event loop; longer ones go to a thread."""

LONGEST = 400
"""Characters of a complaint about a request."""


class _Answer(Protocol):
    """Something to answer with, whole or as events."""

    async def whole(self) -> BaseModel: ...

    def stream(self) -> Pieces: ...

    def close(self) -> None: ...


def create_app(service: Service) -> FastAPI:
    """The application. The engine is the caller's to close."""
    app = FastAPI(title="samba-lm", version=__version__, docs_url=None, redoc_url=None, redirect_slashes=False)
    app.state.service = service
    app.add_middleware(Gate, service=service)
    if service.settings.cors_origins:
        app.add_middleware(
            CORSMiddleware,
            allow_origins=service.settings.cors_origins,
            allow_methods=["GET", "POST", "DELETE"],
            allow_headers=["authorization", "content-type", "x-stainless-*", "*"],
        )
    _errors(app)
    _about(app, service)
    _texts(app, service)
    _contexts(app, service)
    mount(app)
    document(app, service.keys.needed)
    return app


def _errors(app: FastAPI) -> None:
    @app.exception_handler(ApiError)
    @app.exception_handler(UserError)
    async def known(_: Request, error: Exception) -> Response:
        return api_error(error).response()

    @app.exception_handler(HTTPException)
    async def http(request: Request, error: HTTPException) -> Response:
        told = f"{error.detail}."
        if error.status_code == 404:  # every path of ours says what it does not know
            told = f"There is no {request.url.path[:100]} here: /openapi.json lists what there is."
        return ApiError(error.status_code, told, headers=dict(error.headers or {})).response()

    @app.exception_handler(RequestValidationError)
    async def query(_: Request, error: RequestValidationError) -> Response:
        first = error.errors()[0]
        return ApiError(400, f"{first['loc'][-1]}: {first['msg']}.", param=str(first["loc"][-1])).response()

    @app.exception_handler(ClientGone)
    @app.exception_handler(ClientDisconnect)
    async def gone(_: Request, error: Exception) -> Response:
        return Response(status_code=499)  # nobody reads it

    @app.exception_handler(Exception)
    async def defect(request: Request, error: Exception) -> Response:
        logging.getLogger("samba_lm.serve").error("%s failed", request.url.path, exc_info=error)
        return api_error(error).response()


async def read_body(request: Request, kind: type[M]) -> M:
    """A request's JSON. Raises ApiError for what is not, or not of the right kind."""
    _require_type(request, JSON)
    return await parse(await request.body(), kind)


async def parse(body: bytes, kind: type[M]) -> M:
    """JSON as an instance of a class. Raises ApiError."""
    try:
        return await off_loop(body, kind.model_validate_json, body)
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False)[0]
        param = str(first["loc"][0]) if first["loc"] else None
        raise ApiError(
            400, _cut(models.UNIONS.get(param or "") or explain(error, kind)), param=param and _cut(param)
        ) from None


def _cut(text: str) -> str:
    """It may quote what a client sent."""
    return text if len(text) <= LONGEST else text[:LONGEST] + "..."


async def off_loop(body: bytes, work: Callable[P, T], *args: P.args, **options: P.kwargs) -> T:
    """Do some work on a request, in a thread where its body is long."""
    if len(body) <= SHORT_BODY:
        return work(*args, **options)
    return await asyncio.to_thread(work, *args, **options)


def _type(request: Request) -> str:
    return request.headers.get("content-type", "").partition(";")[0].strip().lower()


def _require_type(request: Request, *types: str) -> None:
    encoding = request.headers.get("content-encoding", "identity")
    if encoding.strip().lower() != "identity":
        raise ApiError(415, f"The body may not be compressed, and this one is ({encoding[:40]!r}): send it as it is.")
    # No page of another origin can send these without asking first, and we do not say yes.
    if _type(request) not in types:
        raise ApiError(415, f"The body must be {' or '.join(types)}: say so in Content-Type.")


async def _answer(request: Request, answer: _Answer, stream: bool | None) -> Response:
    if stream:
        return EventStream(answer.stream(), answer.close)
    try:
        whole = await while_connected(request, answer.whole())
        return Response(await asyncio.to_thread(whole.model_dump_json), media_type=JSON)
    finally:
        answer.close()


def _about(app: FastAPI, service: Service) -> None:
    @app.get(
        "/health",
        tags=["about"],
        responses={503: {"model": models.Health, "description": "It takes none."}},
        response_model=models.Health,
    )
    async def health() -> Response:
        """Whether the server takes requests."""
        status = "failed" if service.engine.failure else "stopping" if service.draining else "ok"
        found = models.Health.model_validate({"status": status, **service.engine.counts()})
        return JSONResponse(found.model_dump(), 200 if status == "ok" else 503)

    @app.get("/metrics", tags=["about"], responses=METRICS, response_class=Response)
    async def metrics() -> Response:
        """Counters, in Prometheus' text format."""
        return Response(service.metrics.text(), media_type="text/plain; version=0.0.4; charset=utf-8")

    def model() -> models.Model:
        config, slots = service.engine.model.config, service.engine.slots
        return models.Model(
            id=service.settings.model_name,
            created=service.started,
            vocab_size=config.vocab_size,
            parameters=service.engine.model.config.parameters(),
            state_bytes=slots.nbytes() // slots.capacity,
            constant_state=service.engine.constant,
            chat_template=not isinstance(service.template, PlainTemplate),
            max_tokens=service.settings.max_tokens,
        )

    @app.get("/v1/models", tags=["models"], responses=describe())
    async def list_models() -> models.ModelList:
        """The one model of this server."""
        return models.ModelList(data=[model()])

    @app.get("/v1/models/{name:path}", tags=["models"], responses=describe(404))
    async def show_model(name: str) -> models.Model:
        """That model, by its name."""
        service.check_model(name)
        return model()


def _texts(app: FastAPI, service: Service) -> None:
    @app.post(
        "/v1/completions",
        tags=["texts"],
        responses=describe(400, 404, 408, 413, 415, 429, 503, events=EVENTS, body=models.Completion),
    )
    async def completions(request: Request) -> Response:
        """Continue texts as they are."""
        asked = await read_body(request, models.CompletionRequest)
        service.check_model(asked.model)
        context = await _of(request).get(asked.context_id)
        prompts = await off_loop(await request.body(), read_prompts, service, asked, context)
        return await _answer(request, Completions(service, asked, prompts, context), asked.stream)

    @app.post(
        "/v1/chat/completions",
        tags=["texts"],
        responses=describe(400, 404, 408, 413, 415, 429, 503, events=EVENTS, body=models.ChatCompletion),
    )
    async def chat(request: Request) -> Response:
        """Answer a conversation."""
        asked = await read_body(request, models.ChatRequest)
        service.check_model(asked.model)
        context = await _of(request).get(asked.context_id)
        prompt = await off_loop(await request.body(), service.template.encode, models.said(asked.messages))
        grammar = None
        if asked.response_format is not None:
            grammar = await asyncio.to_thread(grammar_of, service.words, asked.response_format)
        answer = Chat(service, asked, prompt, context, grammar, request.state.client.owner)
        return await _answer(request, answer, asked.stream)

    def _of(request: Request) -> Contexts:
        return contexts_of(request, service)


def contexts_of(request: Request, service: Service) -> Contexts:
    """The contexts of who asks."""
    return Contexts(service, request.state.client.owner)


def _contexts(app: FastAPI, service: Service) -> None:
    @app.post(
        "/v1/contexts",
        tags=["contexts"],
        responses=describe(400, 404, 408, 413, 415, 429, 503, events=EVENTS, body=models.Context),
    )
    async def create(
        request: Request,
        title: Annotated[str, Query(max_length=200, description="Of an upload.")] = "",
        context_id: Annotated[str | None, Query(max_length=64, description="Of an upload: go on after it.")] = None,
        stream: Annotated[bool, Query(description="Of an upload: tell how far it is.")] = False,
    ) -> Response:
        """Read a text once: JSON, or an upload of UTF-8 as it is (application/octet-stream)."""
        _require_type(request, JSON, BINARY)
        contexts, body = contexts_of(request, service), await request.body()
        await contexts.check_room()
        tokenizer = service.engine.tokenizer
        if _type(request) == JSON:
            asked = await parse(body, models.ContextRequest)
            service.check_model(asked.model)
            title, context_id, stream = asked.title, asked.context_id, asked.stream
            if (asked.text is None) == (asked.tokens is None):
                raise ApiError(400, "Give either text or tokens.", param="text")
            if asked.tokens is not None:
                tokens = [await off_loop(body, service.token_ids, asked.tokens)]
            else:
                tokens = await off_loop(body, encode_long, tokenizer, asked.text or "")
        else:
            try:
                text = str(body, "utf-8")
            except UnicodeDecodeError as error:
                raise ApiError(400, f"The upload is not UTF-8: byte {error.start} cannot be read.") from None
            tokens = await off_loop(body, encode_long, tokenizer, text)
        check_title(title)
        reading = Reading(service, contexts, tokens, title, await contexts.get(context_id))
        return await _answer(request, reading, stream)

    @app.get("/v1/contexts", tags=["contexts"], responses=describe())
    async def list_contexts(request: Request) -> models.ContextList:
        """Those of this key, the newest first."""
        return await contexts_of(request, service).list()

    @app.get("/v1/contexts/{name}", tags=["contexts"], responses=describe(404))
    async def show(request: Request, name: str) -> models.Context:
        """One of them."""
        return await contexts_of(request, service).show(name)

    @app.post(
        "/v1/contexts/{name}/fork",
        tags=["contexts"],
        responses=describe(400, 404, 408, 413, 415, 429, 503),
    )
    async def fork(request: Request, name: str) -> models.Context:
        """The same under another id."""
        asked = await read_body(request, models.ForkRequest)
        if asked.title is not None:
            check_title(asked.title)
        return await contexts_of(request, service).fork(name, asked.title)

    @app.delete("/v1/contexts/{name}", tags=["contexts"], responses=describe(404, 413, 429, 503))
    async def delete(request: Request, name: str) -> models.ContextDeleted:
        """Forget one; what was begun from it goes on."""
        return await contexts_of(request, service).delete(name)
