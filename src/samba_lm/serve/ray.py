"""Replicas behind Ray Serve: ``serve run samba_lm.serve.ray:app checkpoint=runs/first replicas=2 contexts=DIR``.

Ray's proxy takes the requests and hands each to one replica; what that does with it is what `samba-lm serve` does.
"""

# No `from __future__ import annotations`: Ray looks at the class that `app` wants.

from pathlib import Path
from typing import Literal

import torch
from fastapi import FastAPI
from pydantic import BaseModel, ConfigDict, Field
from ray import serve

from samba_lm.checkpoint import load
from samba_lm.errors import UserError
from samba_lm.quantization import quantize
from samba_lm.serve.app import create_app
from samba_lm.serve.auth import Keys
from samba_lm.serve.opening import open_service
from samba_lm.serve.service import Service
from samba_lm.serve.settings import LOOPBACK, MIB, Settings

MORE = 64
"""Requests beyond the slots and the queue that Ray hands to a replica, which tells them 429 at once."""


class Options(BaseModel):
    """What a replica is told; the names and what they mean are those of `samba-lm serve --help`."""

    model_config = ConfigDict(extra="forbid")

    checkpoint: str
    replicas: int = Field(1, ge=1, description="Ray's configuration file may say another number, or `auto`.")
    cpus: float = Field(1, gt=0, description="Of each replica.")
    gpus: float = Field(0, ge=0, description="Of each replica; 0: it runs on CPUs.")
    contexts: str | None = Field(None, description="A folder or URL that all replicas reach.")
    name: str | None = None
    slots: int = Field(16, ge=1)
    queue: int = Field(64, ge=0)
    max_tokens: int = Field(4096, ge=1)
    max_prompt_tokens: int = Field(1 << 21, ge=1)
    api_key_file: str | None = Field(None, description="Each replica counts its own requests.")
    allowed_host: str = Field("", description="Names with commas between them.")
    cache: int = Field(256, ge=0)
    max_body: int = Field(32, ge=1)
    body_seconds: float = Field(60, ge=0.1)
    drain: float = Field(30, ge=0)
    batch_invariant: bool = False
    dtype: Literal["float32", "bfloat16"] | None = None
    quantize: Literal["int8", "int4"] | None = None


@serve.ingress()
class Replica:
    """One process with one engine."""

    def __init__(self, options: Options) -> None:
        self._service: Service | None = None
        folder = Path(options.checkpoint)
        keys = Keys() if options.api_key_file is None else Keys.read(Path(options.api_key_file))
        names = tuple(name for name in options.allowed_host.split(",") if name)
        settings = Settings(
            model_name=options.name or folder.resolve().name,
            slots=options.slots,
            queue=options.queue,
            batch_invariant=options.batch_invariant,
            contexts=options.contexts,
            allowed_hosts=names or (None if keys.needed else LOOPBACK),
            max_tokens=options.max_tokens,
            max_prompt_tokens=options.max_prompt_tokens,
            max_body=options.max_body * MIB,
            cache_bytes=options.cache * MIB,
            body_seconds=options.body_seconds,
            drain_seconds=options.drain,
        )
        dtype = None if options.dtype is None else getattr(torch, options.dtype)
        model, tokenizer = load(options.checkpoint, device="cuda" if options.gpus else "cpu", dtype=dtype)
        if tokenizer is None:
            raise UserError(f"{options.checkpoint} has no tokenizer: put its tokenizer.json there.")
        if options.quantize is not None:
            quantize(model, options.quantize)
        self._service = open_service(model, tokenizer, folder, settings, keys)

    def __serve_build_asgi_app__(self) -> FastAPI:
        assert self._service is not None
        return create_app(self._service)

    def check_health(self) -> None:
        """Asked by Ray from time to time; a replica that raises is replaced."""
        assert self._service is not None
        if self._service.engine.failure is not None:
            raise RuntimeError("the engine has failed") from self._service.engine.failure

    def __del__(self) -> None:
        if self._service is not None:
            self._service.close()


def app(options: Options) -> serve.Application:
    """For `serve run` and Ray's configuration file. Raises UserError where replicas would not share their contexts.

    Relative paths are those of the place where this is called; replicas work elsewhere.
    """
    if options.replicas > 1 and options.contexts is None:
        raise UserError(
            f"{options.replicas} replicas would each keep contexts of their own: give contexts=, a folder or a URL "
            "that all of them reach."
        )
    paths = {name: _absolute(getattr(options, name)) for name in ("contexts", "api_key_file")}
    if Path(options.checkpoint).exists():  # else it is a name of the zoo
        paths["checkpoint"] = _absolute(options.checkpoint)
    options = options.model_copy(update=paths)
    gpus = {"num_gpus": options.gpus} if options.gpus else {}
    deployment = serve.deployment(Replica).options(
        num_replicas=options.replicas,
        max_ongoing_requests=options.slots + options.queue + MORE,
        graceful_shutdown_timeout_s=options.drain,
        ray_actor_options={"num_cpus": options.cpus, **gpus},
    )
    return deployment.bind(options)


def _absolute(path: str | None) -> str | None:
    if path is None or "://" in path:
        return path
    return str(Path(path).resolve())
