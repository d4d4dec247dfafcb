"""``samba-lm export RUN OUT``: one folder of a model, of a run at any time."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import tyro
from tyro.conf import Positional

from samba_lm.cli.output import JsonFile, write_json
from samba_lm.cli.parse import parse


@dataclass(frozen=True)
class Export:
    """Write one model's folder (config.json, model.safetensors, tokenizer.json) from a training run.

    The run may go on meanwhile, and may be of many processes: no GPU is needed, and little memory.
    """

    run: Positional[Annotated[Path, tyro.conf.arg(metavar="RUN")]]
    """A run's folder (its newest checkpoint), one of its step-N folders, or any model's folder."""
    out: Positional[Annotated[Path, tyro.conf.arg(metavar="OUT")]]
    """The folder to make; a model that is there is replaced when the new one is complete."""
    step: int | None = None
    """Take the checkpoint after so many steps."""
    dtype: Literal["float32", "bfloat16", "float16"] | None = None
    """Turn the weights into this type, but the recurrence's own, which keep 32 bits; none: as they are."""
    json: JsonFile = None
    """Write what was exported to this file too."""


def main(argv: list[str]) -> None:
    """Run the command."""
    options = parse(Export, argv, prog="samba-lm export")
    import torch

    from samba_lm.convert.export import export

    dtype = None if options.dtype is None else getattr(torch, options.dtype)
    done = export(options.run, options.out, step=options.step, dtype=dtype)
    parameters = done.config.parameters()
    vocabulary = "no tokenizer" if done.tokenizer is None else f"a tokenizer of {done.tokenizer.vocab_size:,}"
    print(
        f"{options.out}: {done.config.name}, {parameters:,} parameters ({done.dtype}, {done.size / 1e6:,.1f} MB), "
        f"{vocabulary}. From {done.source}."
    )
    if options.json is not None:
        write_json(
            options.json,
            {
                "source": done.source,
                "out": options.out,
                "parameters": parameters,
                "dtype": done.dtype,
                "weights_bytes": done.size,
                "weights_sha256": done.sha256,
                "tokenizer": None if done.tokenizer is None else done.tokenizer.fingerprint(),
                "model": done.config.to_dict(),
            },
        )
