"""What a server is told when it starts: what it holds, what it allows, how long it waits."""

from __future__ import annotations

from dataclasses import dataclass

MIB = 1 << 20
LOOPBACK = ("localhost", "127.0.0.1", "::1")
"""This machine's own names."""


@dataclass(frozen=True)
class Settings:
    """See the fields. Times are in seconds, sizes in bytes."""

    model_name: str
    """What clients call the model."""
    host: str = "127.0.0.1"
    port: int = 8000
    """0: any free one."""
    slots: int = 16
    """Texts continued at once; more wait,"""
    queue: int = 64
    """so many of them."""
    batch_invariant: bool = False
    contexts: str | None = None
    """A folder or an fsspec URL for contexts; None: they are kept in memory,"""
    context_bytes: int = 2048 * MIB
    """so much of it."""
    cors_origins: tuple[str, ...] = ()
    """Web pages of other origins that may call: ``https://example.org``, or ``*`` for all."""
    allowed_hosts: tuple[str, ...] | None = None
    """Names by which clients may call the server; None: any."""
    max_tokens: int = 4096
    """Tokens that one answer may have."""
    max_prompt_tokens: int = 1 << 21
    """Tokens that one prompt may have, what stands in a context not counted."""
    max_prompts: int = 256
    """Prompts of one request."""
    max_choices: int = 16
    """Answers to one prompt, ``n``."""
    max_body: int = 32 * MIB
    cache_bytes: int = 256 * MIB
    """For the states of conversations, so that the next turn does not read the last ones again; 0: none are kept."""
    max_contexts: int = 1024
    """Contexts of one key."""
    header_seconds: float = 10.0
    """A connection must have sent its request's head by then,"""
    body_seconds: float = 60.0
    """and the body by then."""
    reading_seconds: float = 60.0
    """A client that reads next to nothing of its answer for so long is cut off."""
    drain_seconds: float = 30.0
    """What runs may go on so long after the server was told to stop."""
    store_seconds: float = 60.0
    """The place where contexts are kept must answer by then."""
    keep_alive_seconds: float = 15.0
    """A stream without news gets a comment so often, or proxies would take it for dead."""
