"""A checkpoint as it is named on the command line: the options that choose it, and loading it to be run."""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import tyro

from samba_lm import shipped
from samba_lm.errors import UserError

if TYPE_CHECKING:
    from samba_lm.contexts.snapshot import Snapshot
    from samba_lm.model import SambaLM
    from samba_lm.tokenizer import Tokenizer

Dtype = Literal["float32", "bfloat16"]
Quantize = Literal["int8", "int4"]
"""The option ``--quantize``, for :func:`load`."""
CheckpointName = Annotated[str, tyro.conf.arg(metavar="CKPT")]
OptionalCheckpoint = Annotated[str, tyro.conf.arg(metavar="[CKPT]")]
"""An argument that may be left out, for the model that comes with the package."""
ContextFile = Annotated[Path | None, tyro.conf.arg(metavar="FILE")]
"""The option ``--context``, for :func:`load_context`."""
AdapterFolder = Annotated[Path | None, tyro.conf.arg(metavar="FOLDER")]
"""The option ``--adapter``, for :func:`load`."""

SMALL = 20_000_000
"""Parameters of a model whose steps one thread makes as fast as several."""


def is_checkpoint(word: str) -> bool:
    """Whether a word on the command line names a checkpoint: a folder, or a model by its name."""
    from samba_lm import zoo

    return bool(word) and (Path(word).is_dir() or word in (shipped.DEFAULT, *shipped.names(), *zoo.names()))


def base_note(name: str) -> str | None:
    """What is said where a model that comes with the package is asked something; None for other checkpoints."""
    if shipped.find(name) is None:
        return None
    return f"{name} is a small base model: it continues texts, and was never taught to answer or to converse."


@dataclass(frozen=True)
class Runtime:
    """Where and in which numbers a checkpoint runs that reads and writes text."""

    device: str = "auto"
    """Where to run: auto (the GPU if there is one), cpu, cuda or cuda:N."""
    dtype: Dtype | None = None
    """Turn the weights into this type; by default they stay as the checkpoint has them."""
    quantize: Quantize | None = None
    """Keep the large weights in 8 or 4 bits a number: less memory and faster answers, at a small cost in quality."""
    adapter: AdapterFolder = None
    """Add this adapter to the weights: the folder that a run with [lora] leaves, or that peft saved."""

    def load(self, name: str) -> tuple[SambaLM, Tokenizer]:
        """As :func:`load_with_tokenizer`."""
        return load_with_tokenizer(name, self.device, self.dtype, self.quantize, self.adapter)


RuntimeOptions = Annotated[Runtime, tyro.conf.arg(name="")]
"""Among a command's other options, as if they were its own."""


def load(
    name: str, device: str, dtype: Dtype | None, quantize: Quantize | None = None, adapter: Path | None = None
) -> tuple[SambaLM, Tokenizer | None]:
    """Load a checkpoint (or a fresh model of the zoo) onto "auto", "cpu", "cuda" or "cuda:N".

    A fresh model is announced on stderr, and on a terminal that this takes its time. ``dtype``: of the parameters; None
    keeps the checkpoint's. ``adapter`` is added to them, and ``quantize``: what is then made of the large ones. Raises
    UserError when there is no such device or no whole checkpoint.
    """
    with _told(f"loading {name}"):
        import torch  # only now: --help should not wait for it

        from samba_lm import checkpoint
        from samba_lm.train.parallel import pick_device

        untrained = checkpoint.find(name) is None  # then it is a name of the zoo, or an error
        wanted = None if dtype is None else getattr(torch, dtype)
        loaded = checkpoint.load(name, device=pick_device(device), dtype=wanted if adapter is None else None)
        if adapter is not None:
            from samba_lm.convert.peft import merge_adapter

            merge_adapter(loaded[0], adapter, loaded[1])
            checkpoint.place(loaded[0], pick_device(device), wanted)
        if quantize is not None:
            from samba_lm import quantization

            quantization.quantize(loaded[0], quantize)
    if untrained:
        print(f"samba-lm: {name} is untrained: its weights are random. Give a checkpoint's folder.", file=sys.stderr)
    return loaded


@contextlib.contextmanager
def _told(text: str) -> Iterator[None]:
    """Say on a terminal what is being done, for as long as it takes; elsewhere nothing."""
    if sys.stderr.isatty():
        shown = text[: max(0, os.get_terminal_size(sys.stderr.fileno()).columns - 1)]  # of the window, not of $COLUMNS
        sys.stderr.write(f"{shown}\r")
        sys.stderr.flush()
        try:
            yield
        finally:
            sys.stderr.write(f"{' ' * len(shown)}\r")
            sys.stderr.flush()
    else:
        yield


def load_with_tokenizer(
    name: str, device: str, dtype: Dtype | None, quantize: Quantize | None = None, adapter: Path | None = None
) -> tuple[SambaLM, Tokenizer]:
    """:func:`load` for what reads and writes text: a checkpoint without a tokenizer is a UserError."""
    model, tokenizer = load(name, device, dtype, quantize, adapter)
    if tokenizer is None:
        raise UserError(
            f"{name} has no tokenizer, so it can neither read nor write text: put its tokenizer.json there."
        )
    return model, tokenizer


def with_one_thread(pieces: Iterator[str], model: SambaLM) -> Iterator[str]:
    """The pieces of a text; those after the first are made with one thread, where a model on a CPU is small.

    The work of its steps is over before other threads have met for it; where the cores have something else to do, they
    would wait for each other many times as long. What was asked is still read with all threads.
    """
    import torch

    before = torch.get_num_threads()
    try:
        for piece in pieces:
            yield piece
            if model.device.type == "cpu" and model.config.parameters() < SMALL:
                torch.set_num_threads(1)
    finally:
        torch.set_num_threads(before)


def load_context(path: Path | None, model: SambaLM, tokenizer: Tokenizer) -> Snapshot | None:
    """The snapshot in a file of `samba-lm context save`, None where none was named. Raises UserError unless it fits."""
    if path is None:
        return None
    from samba_lm.contexts.snapshot import load

    return load(path, model, tokenizer)
