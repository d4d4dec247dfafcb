"""Running the application: a real socket, and a shutdown that finishes what it began."""

from __future__ import annotations

import uvicorn

from samba_lm.engine.engine import Engine
from samba_lm.serve.app import create_app
from samba_lm.serve.settings import Settings


def serve(engine: Engine, settings: Settings) -> None:
    """Answer requests until the process is told to stop (SIGTERM, SIGINT)."""
    config = uvicorn.Config(
        create_app(engine, settings),
        host=settings.host,
        port=settings.port,
        log_level="warning",
        access_log=False,
        server_header=False,
        timeout_graceful_shutdown=int(settings.drain_seconds),
    )
    uvicorn.Server(config).run()
