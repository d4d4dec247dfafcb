"""``samba-lm serve``: a server that speaks OpenAI's protocol."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from tyro.conf import Positional, UseAppendAction

from samba_lm.cli.model import CheckpointName, Dtype, Quantize, load_with_tokenizer
from samba_lm.cli.parse import parse
from samba_lm.errors import UserError

if TYPE_CHECKING:
    from samba_lm.serve.stores import Store


LOOPBACK = ("localhost", "127.0.0.1", "::1")


@dataclass(frozen=True)
class Serve:
    """Serve a checkpoint over HTTP as OpenAI's API does: completions, chat, contexts, metrics.

    Ctrl-C or SIGTERM ends it after what runs is done.
    """

    checkpoint: Positional[CheckpointName]
    """A checkpoint folder, or a training run's: its newest checkpoint."""
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
    """A connection must have sent its request's head by then,"""
    body_seconds: float = 60.0
    """and the body by then."""
    drain: float = 30.0
    """Seconds that running requests may go on after SIGTERM."""
    batch_invariant: bool = False
    """Greedy answers do not depend on what else runs, to the last bit; prompts are read as slowly as answers are
    written."""
    device: str = "auto"
    """Where to run: auto (the GPU if there is one), cpu, cuda or cuda:N."""
    dtype: Dtype | None = None
    """Turn the weights into this type; by default they stay as the checkpoint has them."""
    quantize: Quantize | None = None
    """Keep the large weights in 8 or 4 bits a number: less memory and faster answers, at a small cost in quality."""


def main(argv: list[str]) -> None:
    """Run ``samba-lm serve`` with these arguments."""
    command = parse(Serve, argv, prog="samba-lm serve")
    _check(command)
    try:
        from samba_lm.serve.app import create_app
        from samba_lm.serve.auth import Keys
        from samba_lm.serve.server import serve
        from samba_lm.serve.service import Service
        from samba_lm.serve.settings import MIB, Settings
        from samba_lm.serve.stores import FileStore, MemoryStore
        from samba_lm.serve.templates import find_template
    except ModuleNotFoundError as error:
        raise UserError(
            f"The server needs the package {error.name}: install it with `pip install 'samba-lm[serve]'`."
        ) from error
    from samba_lm.checkpoint import latest_step
    from samba_lm.engine.engine import Engine

    keys = Keys() if command.api_key_file is None else Keys.read(command.api_key_file)
    model, tokenizer = load_with_tokenizer(command.checkpoint, command.device, command.dtype, command.quantize)
    folder = Path(command.checkpoint).resolve()
    settings = Settings(
        model_name=command.name or folder.name,
        host=command.host,
        port=command.port,
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
    if command.contexts is None:
        store: Store = MemoryStore(command.context_memory * MIB)
    else:
        store = FileStore(command.contexts, model, tokenizer, settings.cache_bytes)
    template = find_template(latest_step(folder) or folder, tokenizer)
    with Engine(
        model, tokenizer, slots=command.slots, queue_limit=command.queue, batch_invariant=command.batch_invariant
    ) as engine:
        service = Service(engine, settings, keys, template, store)
        serve(create_app(service), service)


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
