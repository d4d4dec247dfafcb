"""``samba-lm serve``: a server that speaks OpenAI's protocol."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path

from tyro.conf import Positional

from samba_lm.cli.model import CheckpointName, Dtype, load_with_tokenizer
from samba_lm.cli.parse import parse
from samba_lm.errors import UserError


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
    batch_invariant: bool = False
    """Greedy answers do not depend on what else runs, to the last bit; prompts are read as slowly as answers are
    written."""
    device: str = "auto"
    """Where to run: auto (the GPU if there is one), cpu, cuda or cuda:N."""
    dtype: Dtype | None = None
    """Turn the weights into this type; by default they stay as the checkpoint has them."""


def main(argv: list[str]) -> None:
    """Run ``samba-lm serve`` with these arguments."""
    command = parse(Serve, argv, prog="samba-lm serve")
    try:
        from samba_lm.serve.server import serve
        from samba_lm.serve.settings import Settings
    except ModuleNotFoundError as error:
        raise UserError(
            f"The server needs the package {error.name}: install it with `pip install 'samba-lm[serve]'`."
        ) from error
    from samba_lm.engine.engine import Engine

    model, tokenizer = load_with_tokenizer(command.checkpoint, command.device, command.dtype)
    settings = Settings(
        model_name=command.name or Path(command.checkpoint).resolve().name,
        host=command.host,
        port=command.port,
        max_tokens=command.max_tokens,
    )
    with Engine(
        model, tokenizer, slots=command.slots, queue_limit=command.queue, batch_invariant=command.batch_invariant
    ) as engine:
        print(f"samba-lm: serving {settings.model_name} at http://{settings.host}:{settings.port}", file=sys.stderr)
        serve(engine, settings)
