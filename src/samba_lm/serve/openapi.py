"""The OpenAPI document: FastAPI's, with the bodies that we read ourselves and every answer that can come."""

from __future__ import annotations

from typing import Any

from fastapi import FastAPI
from pydantic import BaseModel

from samba_lm.serve.models import ChatRequest, CompletionRequest, ContextRequest, ErrorBody, ForkRequest

JSON, BINARY, EVENT_STREAM = "application/json", "application/octet-stream", "text/event-stream"
REF = "#/components/schemas/{model}"
EVENTS: dict[str, Any] = {
    EVENT_STREAM: {
        "schema": {
            "type": "object",
            "description": "With stream: each event's data is a JSON object, the last one's `[DONE]`.",
            "properties": {"data": {"type": "string"}},
            "required": ["data"],
        }
    }
}
METRICS: dict[int | str, dict[str, Any]] = {
    200: {"description": "Counters", "content": {"text/plain": {"schema": {"type": "string"}}}},
    401: {"model": ErrorBody, "description": "No API key, or a wrong one."},
}
BODIES: dict[str, type[BaseModel]] = {
    "/v1/completions": CompletionRequest,
    "/v1/chat/completions": ChatRequest,
    "/v1/contexts": ContextRequest,
    "/v1/contexts/{name}/fork": ForkRequest,
}
"""Of POST; all of them are JSON."""
UPLOADS = {"/v1/contexts"}
"""These take bytes as they are too."""
WORDS = {
    400: "The request is wrong; the message says what and how to mend it.",
    401: "No API key, or a wrong one.",
    404: "There is no such model or context.",
    408: "The body came too slowly.",
    413: "The body is too large.",
    415: "The body is of a type that is not read here.",
    429: "Too many requests wait, or this key makes too many: see Retry-After.",
    503: "The server is shutting down.",
}


def describe(
    *statuses: int, events: dict[str, Any] | None = None, body: type[BaseModel] | None = None
) -> dict[int | str, dict[str, Any]]:
    """The answers of a path, for FastAPI. ``body``: of a success, where the handler's type does not tell."""
    answers: dict[int | str, dict[str, Any]] = {}
    for status in (401, *statuses):
        answers[status] = {"model": ErrorBody, "description": WORDS[status]}
        if status == 429:
            answers[status]["headers"] = {"Retry-After": {"schema": {"type": "integer"}, "description": "Seconds"}}
    if body is not None:
        answers[200] = {"model": body, "description": "Done", **({"content": events} if events else {})}
    return answers


def document(app: FastAPI, keys: bool) -> None:
    """Make the application's document complete. ``keys``: whether it asks for any."""
    original = app.openapi

    def openapi() -> dict[str, Any]:
        if app.openapi_schema:
            return app.openapi_schema
        schema = original()
        components = schema.setdefault("components", {}).setdefault("schemas", {})
        for path, model in BODIES.items():
            found = model.model_json_schema(ref_template=REF)
            components.update(found.pop("$defs", {}))
            components[model.__name__] = found
            content: dict[str, Any] = {JSON: {"schema": {"$ref": REF.format(model=model.__name__)}}}
            if path in UPLOADS:
                content[BINARY] = {"schema": {"type": "string", "format": "binary"}}
            schema["paths"][path]["post"]["requestBody"] = {"required": True, "content": content}
        for path, methods in schema["paths"].items():
            for operation in methods.values():
                operation["responses"].pop("422", None)  # a wrong request gets 400 here
                if not keys:
                    operation["responses"].pop("401", None)
                elif path.startswith("/v1/") or path == "/metrics":
                    operation["security"] = [{"key": []}]
        for unused in ("HTTPValidationError", "ValidationError"):
            components.pop(unused, None)
        if keys:
            schema["components"]["securitySchemes"] = {"key": {"type": "http", "scheme": "bearer"}}
        return schema

    app.openapi = openapi  # type: ignore[method-assign]
