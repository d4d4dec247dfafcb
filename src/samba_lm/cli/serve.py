"""``samba-lm serve``: a server that speaks OpenAI's protocol."""

from __future__ import annotations

import sys
from dataclasses import dataclass, field
from pathlib import Path

from tyro.conf import Positional, UseAppendAction

from samba_lm import shipped
from samba_lm.cli.model import OptionalCheckpoint, Runtime, RuntimeOptions, base_note
from samba_lm.cli.parse import parse
from samba_lm.errors import UserError


@dataclass(frozen=True)
class Serve:
    """Serve a checkpoint over HTTP as OpenAI's API does: completions, chat, contexts, metrics.

    Its address, in a browser, is a page to talk to the model; clients of OpenAI's API take it with /v1 after it. Ctrl-C
    or SIGTERM ends it when what runs is done, a second one at once.
    """

    checkpoint: Positional[OptionalCheckpoint] = shipped.DEFAULT
    """A checkpoint folder, or a training run's: its newest checkpoint; samba-nano comes along."""
    host: str = "127.0.0.1"
    """The address to listen at; 0.0.0.0 lets other machines in."""
    port: int = 8000
    """The port to listen at; 0: any free one, which is printed."""
    name: str | None = None
    """What clients call the model; by default the checkpoint's folder."""
    slots: int = 16
    """Texts continued at once; more wait."""
    queue: int = 64
    """Texts that may wait; more get 429."""
    max_tokens: int = 4096
    """Tokens that one answer may have."""
    max_prompt_tokens: int = 1 << 21
    """Tokens that one prompt may have, what stands in a context not counted."""
    api_key_file: Path | None = None
    """A file with an API key a line, limits after it: `requests_per_minute=60 concurrent=4 name=alice`."""
    cors_origin: UseAppendAction[tuple[str, ...]] = ()
    """A web page's origin that may call, such as https://example.org, or `*`; may be given several times."""
    allowed_host: UseAppendAction[tuple[str, ...]] = ()
    """A name by which clients may call this server, as in their URL; may be given several times. By default any, but
    without keys and at a loopback address only this machine's, so that no web page can pretend to be it."""
    contexts: str | None = None
    """Keep contexts in this folder, or at this fsspec URL, which replicas may share; by default in memory."""
    cache: int = 256
    """MiB for the states of conversations, so that their next turn reads only what is new; 0: none are kept."""
    context_memory: int = 2048
    """MiB for contexts, where they are kept in memory."""
    max_body: int = 32
    """MiB that one request's body may have."""
    head_seconds: float = 10.0
    """Seconds that a connection may take to send a request's head."""
    body_seconds: float = 60.0
    """Seconds that a request's body may then take."""
    drain: float = 30.0
    """Seconds that running requests may go on after SIGTERM."""
    batch_invariant: bool = False
    """Greedy answers do not depend on what else runs, to the last bit; prompts are read as slowly as answers are
    written."""
    runtime: RuntimeOptions = field(default_factory=Runtime)


def main(argv: list[str]) -> None:
    """Run ``samba-lm serve`` with these arguments."""
    command = parse(Serve, argv, prog="samba-lm serve")
    _check(command)
    try:
        from samba_lm.serve.app import create_app
        from samba_lm.serve.auth import Keys
        from samba_lm.serve.opening import open_service
        from samba_lm.serve.server import serve
        from samba_lm.serve.settings import LOOPBACK, MIB, Settings
    except ModuleNotFoundError as error:
        raise UserError(
            f"The server needs the package {error.name}: install it with `pip install 'samba-lm[serve]'`."
        ) from error
    folder = (shipped.find(command.checkpoint) or Path(command.checkpoint)).resolve()
    keys = Keys() if command.api_key_file is None else Keys.read(command.api_key_file)
    settings = Settings(
        model_name=command.name or folder.name,
        host=command.host,
        port=command.port,
        slots=command.slots,
        queue=command.queue,
        batch_invariant=command.batch_invariant,
        contexts=command.contexts,
        context_bytes=command.context_memory * MIB,
        cors_origins=command.cors_origin,
        allowed_hosts=command.allowed_host or (None if keys.needed or command.host not in LOOPBACK else LOOPBACK),
        max_tokens=command.max_tokens,
        max_prompt_tokens=command.max_prompt_tokens,
        max_body=command.max_body * MIB,
        cache_bytes=command.cache * MIB,
        header_seconds=command.head_seconds,
        body_seconds=command.body_seconds,
        drain_seconds=command.drain,
    )
    model, tokenizer = command.runtime.load(command.checkpoint)
    service = open_service(model, tokenizer, folder, settings, keys)
    if note := base_note(command.checkpoint):
        print(f"samba-lm: {note}", file=sys.stderr)
    if command.host not in LOOPBACK and not keys.needed:
        print(
            f"samba-lm: whoever reaches {command.host} may use this server: --api-key-file limits it to who has a key.",
            file=sys.stderr,
        )
    try:
        serve(create_app(service), service)
    finally:
        service.close()


def _check(command: Serve) -> None:
    for name, value, least in (
        ("--slots", command.slots, 1),
        ("--queue", command.queue, 0),
        ("--max-tokens", command.max_tokens, 1),
        ("--max-prompt-tokens", command.max_prompt_tokens, 1),
        ("--cache", command.cache, 0),
        ("--context-memory", command.context_memory, 0),
        ("--max-body", command.max_body, 1),
        ("--head-seconds", command.head_seconds, 0.1),
        ("--body-seconds", command.body_seconds, 0.1),
        ("--drain", command.drain, 0),
    ):
        if not least <= value < 2**31:
            raise UserError(f"{name} {value} is out of range: give at least {least}.")
    if not 0 <= command.port < 2**16:
        raise UserError(f"--port {command.port} is out of range: give 1 to 65535, or 0 for any free one.")
