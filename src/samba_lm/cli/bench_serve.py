"""``samba-lm bench serve URL``: a running server under load, seen by its clients."""

from __future__ import annotations

import asyncio
import os
from dataclasses import dataclass
from typing import Annotated

import tyro
from rich.console import Console

from samba_lm.cli.output import JsonFile, write_json
from samba_lm.cli.parse import parse
from samba_lm.errors import UserError

KEY_VARIABLE = "SAMBA_LM_API_KEY"


@dataclass(frozen=True)
class BenchServe:
    """Keep streams open against a running `samba-lm serve` and tell how long clients waited for tokens.

    A text counts when it came whole; anything else is an error. An API key is taken from the variable
    SAMBA_LM_API_KEY."""

    url: tyro.conf.Positional[Annotated[str, tyro.conf.arg(metavar="URL")]]
    """Where it listens, such as http://127.0.0.1:8000."""
    streams: int = 64
    """Streams at once; give the server as many --slots, or some of them wait."""
    seconds: float = 60.0
    """How long to go on."""
    max_tokens: int = 128
    """Tokens of each text."""
    crowd: int = 0
    """After that, so many clients at once that come when the server is full: how fast are they told 429?"""
    hold: int = 0
    """Texts that fill the server for --crowd: its --slots and its --queue together."""
    json: JsonFile = None
    """Also write the figures to this file."""


def main(argv: list[str]) -> None:
    """Run ``samba-lm bench serve`` with these arguments."""
    command = parse(BenchServe, argv, prog="samba-lm bench serve")
    if not 1 <= command.streams <= 10_000 or not 0 < command.seconds <= 86_400 or not 1 <= command.max_tokens <= 10**6:
        raise UserError("Give 1 to 10000 --streams, up to 86400 --seconds, and 1 to 1000000 --max-tokens.")
    if bool(command.crowd) != bool(command.hold) or min(command.crowd, command.hold) < 0:
        raise UserError("--crowd and --hold go together: --hold is the server's --slots and --queue together.")
    from samba_lm.bench.serving import Target, measure_crowd, measure_streams

    target = Target(command.url, os.environ.get(KEY_VARIABLE), max_tokens=command.max_tokens)
    target.address()
    console = Console()
    with console.status(f"{command.streams} streams for {command.seconds:g} s"):
        load = asyncio.run(measure_streams(target, command.streams, command.seconds))
    record = load.record()
    console.print(
        f"{load.streams} streams for {load.seconds:.1f} s: {load.finished} texts of {command.max_tokens} tokens, "
        f"{load.tokens / load.seconds:,.0f} tokens/s, {len(load.errors)} errors",
        highlight=False,
    )
    for name, key in (("first token", "first_token"), ("between tokens", "between_tokens")):
        console.print(f"  {name + ':':<16}{_times(record[key])}", highlight=False)
    for error in load.errors[:3]:
        console.print(f"  error: {error}", highlight=False, markup=False)
    if command.crowd:
        with console.status(f"{command.crowd} clients beyond the queue"):
            crowd = asyncio.run(measure_crowd(target, command.crowd, command.hold))
        told = ", ".join(f"{count} x {status or 'cut off'}" for status, count in sorted(crowd.statuses.items()))
        console.print(f"{command.crowd} clients beyond the queue: {told}", highlight=False)
        console.print(f"  {'answer:':<16}{_times(crowd.record()['seconds'])}", highlight=False)
        record["crowd"] = crowd.record()
    if command.json is not None:
        write_json(command.json, {"serve": record})


def _times(found: object) -> str:
    assert isinstance(found, dict)
    return ", ".join(f"{name} {1000 * seconds:,.1f} ms" for name, seconds in found.items()) or "none"
