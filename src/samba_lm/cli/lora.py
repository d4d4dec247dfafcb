"""``samba-lm lora``: adapters in peft's format and the models they belong to."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro
from tyro.conf import Positional

from samba_lm.cli.model import CheckpointName
from samba_lm.cli.parse import parse


@dataclass(frozen=True)
class Merge:
    """Add an adapter to the weights it was trained on, and save the whole as a checkpoint of its own.

    Takes what a run with [lora] leaves in its adapter folder, and what peft saved of a model that `samba-lm convert
    to-transformers` wrote.
    """

    base: Positional[CheckpointName]
    """The checkpoint that the adapter was trained on."""
    adapter: Positional[Annotated[Path, tyro.conf.arg(metavar="ADAPTER")]]
    """The adapter's folder."""
    out: Positional[Annotated[Path, tyro.conf.arg(metavar="OUT")]]
    """The checkpoint folder to make."""


def main(argv: list[str]) -> None:
    """Run ``lora merge``."""
    options = parse(Merge, argv[1:], prog="samba-lm lora merge")
    from samba_lm import checkpoint
    from samba_lm.convert.peft import merge_adapter

    checkpoint.check_replaceable(options.out)  # before the work and not after it
    model, tokenizer = checkpoint.load(options.base)
    changed = merge_adapter(model, options.adapter, tokenizer)
    checkpoint.save(model, options.out, tokenizer)
    print(f"{options.out}: {options.base} with {changed} weights changed by {options.adapter}.")
