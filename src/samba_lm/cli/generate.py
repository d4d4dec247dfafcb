"""``samba-lm generate``: continue a prompt of any length, the text on stdout and what it cost on stderr."""

from __future__ import annotations

import contextlib
import dataclasses
import os
import shlex
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, BinaryIO, Protocol, TextIO

import tyro
from rich.console import Console
from tyro.conf import OmitArgPrefixes, Positional, UseAppendAction
from tyro.constructors import PrimitiveConstructorSpec

from samba_lm import shipped
from samba_lm.cli.model import ContextFile, Runtime, RuntimeOptions, is_checkpoint, load_context, with_one_thread
from samba_lm.cli.output import JsonFile, write_json
from samba_lm.cli.parse import parse
from samba_lm.errors import UserError
from samba_lm.generation.params import DEFAULT_CHUNK, SamplingParams
from samba_lm.generation.prompt import Prompt, encode_pieces, read_text
from samba_lm.memory import peak_memory
from samba_lm.train.progress import count

if TYPE_CHECKING:
    import torch

    from samba_lm.contexts.snapshot import Snapshot
    from samba_lm.generation.stream import Timing
    from samba_lm.model import SambaLM
    from samba_lm.tokenizer import Tokenizer

TokenLimit = Annotated[
    int | None,
    PrimitiveConstructorSpec(
        nargs=1,
        metavar="INT|unlimited",
        instance_from_str=lambda words: None if words[0] == "unlimited" else int(words[0]),
        is_instance=lambda value: value is None or isinstance(value, int),
        str_from_instance=lambda value: ["unlimited" if value is None else str(value)],
    ),
]


@dataclass(frozen=True)
class SamplingOptions(SamplingParams):
    """How the text is continued, and when it ends."""

    max_tokens: TokenLimit = 256
    """Tokens to make at most; `unlimited`: until the end-of-text token or Ctrl-C, in constant memory (not with full
    attention, whose memory grows)."""
    stop: UseAppendAction[tuple[str, ...]] = ()
    """End the text before this string; may be given several times."""


@dataclass(frozen=True)
class Generate:
    """Continue a prompt: the new text goes to stdout as it is made, what it cost to stderr.

    Prompts of any length are read in constant memory. An empty prompt starts a new document. One argument alone is the
    prompt if it holds a space or is `-`, else the checkpoint (as the name of a folder that is there always is).
    """

    checkpoint: Positional[Annotated[str | None, tyro.conf.arg(metavar="[CKPT]")]] = None
    """A checkpoint folder, or a training run's: its newest checkpoint; by default samba-nano, which comes along."""
    text: Positional[Annotated[str | None, tyro.conf.arg(metavar="[PROMPT]")]] = None
    """The text to continue, between quotes; `-` reads the standard input."""
    prompt: str | None = None
    """The text to continue, whatever it is."""
    prompt_file: Path | None = None
    """A UTF-8 file to continue; `-` is the standard input. It is read in pieces, never whole."""
    context: ContextFile = None
    """Go on from this file of `samba-lm context save`; a prompt follows what was read there."""
    sampling: OmitArgPrefixes[SamplingOptions] = field(default_factory=SamplingOptions)
    chunk: int = DEFAULT_CHUNK
    """Prompt tokens read at once: more is faster and takes more memory."""
    runtime: RuntimeOptions = field(default_factory=Runtime)
    json: JsonFile = None
    """Write the figures of the last line to this file too."""

    @property
    def name(self) -> str:
        """Of the checkpoint."""
        return self.checkpoint or shipped.DEFAULT


def main(argv: list[str]) -> None:
    """Run ``samba-lm generate`` with these arguments."""
    command = _sorted(parse(Generate, argv, prog="samba-lm generate"))
    with contextlib.ExitStack() as stack:
        path = None if command.prompt_file == Path("-") else command.prompt_file
        file = _open_prompt(command, stack)
        model, tokenizer = command.runtime.load(command.name)
        if file is None:
            prompt: Prompt = command.prompt or command.text or ""
        else:
            prompt = encode_pieces(read_text(file, str(path or "The standard input")), tokenizer)
        context = load_context(command.context, model, tokenizer)
        told = None if path is None else file
        write_continuation(command, model, tokenizer, prompt, command.sampling, told, context)


def _sorted(command: Generate) -> Generate:
    """Tell which of the two arguments a lone one is."""
    word = command.checkpoint
    if word is None or command.text is not None or is_checkpoint(word):
        return command
    if word in ("", "-") or any(map(str.isspace, word)):
        return dataclasses.replace(command, checkpoint=None, text=word)
    raise UserError(
        f"{word[:60]!r} is no checkpoint: neither a folder that is there nor a model's name. To continue it as a text: "
        f"--prompt {shlex.quote(word[:60])}."
    )


def _open_prompt(command: Generate, stack: contextlib.ExitStack) -> BinaryIO | None:
    """Open what the prompt is read from; None when it is on the command line, or empty."""
    given = [
        name
        for name, value in (
            ("-" if command.text == "-" else "PROMPT", command.text),
            ("--prompt", command.prompt),
            ("--prompt-file", command.prompt_file),
        )
        if value is not None
    ]
    if len(given) > 1:
        raise UserError(f"{' and '.join(given)} were both given: say once where the prompt comes from.")
    if command.text == "-" or command.prompt_file == Path("-"):
        return open_stdin().buffer
    return None if command.prompt_file is None else stack.enter_context(command.prompt_file.open("rb"))


def open_stdin() -> TextIO:
    """The standard input. Raises UserError where this process was started without one."""
    if sys.stdin is None:
        raise UserError("The standard input is closed: start samba-lm with one, or from a terminal.")
    return sys.stdin


class Command(Protocol):
    """What is asked of a command that writes a text, besides the text."""

    @property
    def name(self) -> str: ...
    @property
    def chunk(self) -> int: ...
    @property
    def runtime(self) -> Runtime: ...
    @property
    def json(self) -> Path | None: ...


def write_continuation(
    command: Command,
    model: SambaLM,
    tokenizer: Tokenizer,
    prompt: Prompt,
    sampling: SamplingParams,
    file: BinaryIO | None,
    context: Snapshot | None = None,
    strip: bool = False,
) -> None:
    """Read a prompt and write what follows; ``file``: tells how far it was read; ``strip``: no space comes first."""
    from samba_lm.generation.api import stream

    if sampling.max_tokens is None and not model.config.constant_state:
        raise UserError(
            f"{model.config.name} has full attention, whose memory grows with the text: unlimited generation needs a "
            "model of constant state (`samba-lm models` tells which are); give --max-tokens a number."
        )
    with Console(stderr=True).status("reading the prompt") as status:  # silent unless stderr is a terminal
        text = stream(
            model,
            tokenizer,
            prompt,
            sampling,
            chunk=command.chunk,
            context=None if context is None else context.reader(),
            on_progress=lambda tokens: status.update(f"reading the prompt: {tokens:,} tokens{file_share(file)}"),
        )
        try:
            for piece in with_one_thread(text, model):
                status.stop()
                if strip:
                    piece = piece.lstrip()
                    strip = not piece
                print(piece, end="", flush=True)
            interrupted = False
        except KeyboardInterrupt:
            interrupted = True
    print(flush=True)
    _report(command, sampling, text.timing, model, interrupted, context)
    if interrupted:
        raise KeyboardInterrupt


def file_share(file: BinaryIO | None) -> str:
    """How much of the prompt's file was read, such as ``", 41% of 12.3 MB"``; "" where no file tells its size."""
    if file is None or not file.seekable():
        return ""
    place, size = file.tell(), os.fstat(file.fileno()).st_size
    return f", {100 * min(place, size) // size}% of {count(size)}B" if size else ""


def _report(
    command: Command,
    sampling: SamplingParams,
    timing: Timing,
    model: SambaLM,
    interrupted: bool,
    context: Snapshot | None,
) -> None:
    memory = _peak_memory(model.device)
    prompt = f"{timing.prompt_tokens:,} token{'s' * (timing.prompt_tokens != 1)}"
    before = "" if context is None else f"went on after {context.tokens:,} tokens of {context.title!r}, "
    ending = "interrupted" if interrupted else timing.finish
    print(
        f"{before}read {prompt} in {timing.read_seconds:.2f} s "
        f"({timing.read_tokens_per_second:,.0f} tokens/s), "
        f"made {timing.new_tokens:,} in {timing.decode_seconds:.2f} s "
        f"({timing.decode_tokens_per_second:,.1f} tokens/s), "
        f"peak memory {memory / 2**20:,.0f} MiB, ended by: {ending}",
        file=sys.stderr,
    )
    if command.json is not None:
        record = {
            "checkpoint": command.name,
            "device": str(model.device),
            "dtype": str(model.dtype).removeprefix("torch."),
            "quantize": command.runtime.quantize,
            "sampling": dataclasses.asdict(sampling),
            "context_tokens": 0 if context is None else context.tokens,
            **dataclasses.asdict(timing),
            "read_tokens_per_second": timing.read_tokens_per_second,
            "decode_tokens_per_second": timing.decode_tokens_per_second,
            "peak_memory_bytes": memory,
            "finish": ending,
        }
        write_json(command.json, record)


def _peak_memory(device: torch.device) -> int:
    """The most memory this process has held so far, in bytes: the GPU's on a GPU, else the main memory's."""
    if device.type != "cuda":
        return peak_memory()
    import torch

    return torch.cuda.max_memory_allocated(device)
