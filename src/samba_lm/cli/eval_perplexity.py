"""``samba-lm eval perplexity``: a checkpoint's perplexity against context length, as a table and as JSON."""

from __future__ import annotations

import hashlib
import math
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import numpy as np
import tyro
from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn
from rich.table import Table
from tyro.conf import Positional, UseAppendAction

from samba_lm.cli.eval import Lengths
from samba_lm.cli.model import CheckpointName, Dtype, Quantize, load
from samba_lm.cli.output import JsonFile, write_json
from samba_lm.cli.parse import parse
from samba_lm.data.shards import META_FILE, TokenDataset, file_sha256, is_dataset, open_splits, token_dtype
from samba_lm.data.sources import OnError, ReadOptions, find_files, read_file
from samba_lm.errors import UserError
from samba_lm.eval.protocols import MEANING, Protocol, Settings

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from samba_lm.eval.perplexity import LengthResult
    from samba_lm.model import SambaLM
    from samba_lm.tokenizer import Tokenizer

PROG = "samba-lm eval perplexity"


@dataclass(frozen=True)
class Perplexity:
    checkpoint: Positional[CheckpointName]
    """A checkpoint folder, or a training run's (its newest step)."""
    data: Annotated[tuple[Path, ...], tyro.conf.arg(metavar="FOLDER|FILE ...")]
    """One folder made by `samba-lm data prepare` (of train and val, val), or text files and folders of them."""
    lengths: Lengths = (512, 1024, 2048, 4096, 8192)
    """Context lengths in tokens."""
    protocol: Protocol = "full-window"
    """What is measured: see above. Figures of two protocols are not comparable."""
    stride: int | None = None
    """Tokens between windows, or scored in each: see above."""
    window: int | None = None
    """Of sliding-window: most tokens read at once; by default the length the checkpoint was trained on, if it tells."""
    max_tokens: int | None = None
    """Stop after about so many tokens of text at each length, to bound the time; one window is always read."""
    batch: int | None = None
    """Windows read at once; by default as many as make 2,048 tokens (32,768 on a GPU). Changes no result."""
    device: str = "auto"
    """Where to run: auto (the GPU if there is one), cpu, cuda or cuda:N."""
    dtype: Dtype | None = None
    """What the matrix products are computed in; by default what the checkpoint says."""
    quantize: Quantize | None = None
    """Keep the large weights in 8 or 4 bits a number, to see what that costs."""
    field: str = "text"
    """Of text files: the text's field in JSON lines, or column in Parquet."""
    suffix: UseAppendAction[tuple[str, ...]] = ()
    """Of text files: take this ending too from folders, as plain text, such as .py; may be given several times."""
    errors: OnError = "strict"
    """Of text files, on bytes that are not UTF-8: stop and say where, or put the replacement character there."""
    json: JsonFile = None
    """Write the figures, and all that is needed to measure them again, to this file."""


DESCRIPTION = "Measure perplexity against context length L, by one of these protocols:\n\n" + "\n\n".join(
    f"{name}: {meaning}" for name, meaning in MEANING.items()
)


@dataclass(frozen=True)
class _Data:
    """What is measured, and the facts that identify it."""

    tokens: TokenDataset | list[NDArray[np.unsignedinteger]]
    facts: dict[str, object]


def main(argv: list[str]) -> None:
    """Run ``samba-lm eval perplexity`` with these arguments (the first is ``perplexity``)."""
    options = parse(Perplexity, argv[1:], prog=PROG, description=DESCRIPTION)
    settings = _settings(options)  # a mistake in them is told before anything is read
    from samba_lm.eval.perplexity import perplexity  # only now: --help should not wait for torch

    model, tokenizer = load(options.checkpoint, options.device, options.dtype, options.quantize)
    data = _read(options, tokenizer)
    began = time.perf_counter()
    with _progress() as tell:
        results = perplexity(
            model,
            data.tokens,
            settings.lengths,
            protocol=settings.protocol,
            stride=settings.stride,
            window=settings.window,
            max_tokens=settings.max_tokens,
            tokenizer=tokenizer,
            batch=options.batch,
            progress=tell,
        )
    seconds = time.perf_counter() - began
    name = options.checkpoint if model.quantized is None else f"{options.checkpoint} in {model.quantized}"
    _print(Console(), name, settings, results)
    if options.json is not None:
        write_json(options.json, _record(options, settings, model, tokenizer, data, results, seconds))
    wrong = [result for result in results if result.windows and math.isnan(result.loss)]
    if wrong:
        raise UserError(f"{wrong[0].note[0].upper()}{wrong[0].note[1:]}.")


def _settings(options: Perplexity) -> Settings:
    window = options.window
    if options.protocol == "sliding-window" and window is None:
        window = _trained_length(options.checkpoint)
        if window is None:
            raise UserError(
                f"{options.checkpoint} does not tell the length it was trained on: give it with --window N."
            )
    return Settings.of(
        options.protocol, options.lengths, stride=options.stride, window=window, max_tokens=options.max_tokens
    )


def _trained_length(folder_or_name: str) -> int | None:
    """Tokens of a training row, where the checkpoint is one of our runs'."""
    from samba_lm.train.checkpoints import read_state

    folder = _resolved(folder_or_name)
    if not (folder / "trainer.json").is_file():
        return None
    return int(read_state(folder).recipe["train"]["length"])


def _resolved(folder_or_name: str) -> Path:
    """The folder with the weights: a run's is its newest step."""
    from samba_lm import checkpoint

    folder = Path(folder_or_name)
    return checkpoint.latest_step(folder) or folder


def _read(options: Perplexity, tokenizer: Tokenizer | None) -> _Data:
    prepared = [path for path in options.data if is_dataset(path)]
    if prepared and len(options.data) > 1:
        raise UserError(
            f"--data {prepared[0]} is prepared data, and {len(options.data) - 1} more were given: give it alone, or "
            "text files only."
        )
    return _open(prepared[0], tokenizer) if prepared else _encode(options, tokenizer)


def _open(folder: Path, tokenizer: Tokenizer | None) -> _Data:
    first, held_out = open_splits(folder)
    dataset = held_out or first
    if tokenizer is not None and dataset.tokenizer.fingerprint() != tokenizer.fingerprint():
        raise UserError(
            f"{dataset.folder} was made with another tokenizer than the checkpoint's: prepare the text again with "
            "--tokenizer CHECKPOINT, or give the text files themselves."
        )
    facts: dict[str, object] = {
        "paths": [dataset.folder],
        "tokens": dataset.num_tokens,
        "documents": dataset.num_documents,
        "tokenizer": dataset.tokenizer.fingerprint(),
        "meta_sha256": file_sha256(dataset.folder / META_FILE),
    }
    return _Data(dataset, facts)


def _encode(options: Perplexity, tokenizer: Tokenizer | None) -> _Data:
    """The documents of text files, each with its separator, as `data prepare` would write them."""
    files = find_files(options.data, options.suffix)
    if tokenizer is None:
        raise UserError(
            f"{options.checkpoint} has no tokenizer to read text with: give data prepared with the model's tokenizer."
        )
    dtype = token_dtype(tokenizer.vocab_size)
    documents = []
    parts: list[NDArray[np.unsignedinteger]] = []
    for file in files:
        for piece in read_file(file, ReadOptions(field=options.field, errors=options.errors)):
            if parts or not piece.end or piece.text.strip():
                parts.append(tokenizer.encode(piece.text).astype(dtype))
                if piece.end:
                    documents.append(np.concatenate([*parts, np.array([tokenizer.eos_id], dtype)]))
                    parts = []
    if not documents:
        raise UserError(f"No text in the input: {files[0].path} and the others hold only white space.")
    digest = hashlib.sha256()
    for document in documents:
        digest.update(document.tobytes())
    facts: dict[str, object] = {
        "paths": list(options.data),
        "files": len(files),
        "tokens": sum(document.size for document in documents),
        "documents": len(documents),
        "tokenizer": tokenizer.fingerprint(),
        "tokens_sha256": digest.hexdigest(),
    }
    return _Data(documents, facts)


def _print(console: Console, name: str, settings: Settings, results: Sequence[LengthResult]) -> None:
    def say(line: str) -> None:
        console.print(line, markup=False, highlight=False)

    say(f"{name}: perplexity, protocol {settings.protocol}{_values(settings)}")
    table = Table(show_edge=False, pad_edge=False)
    wide = console.width >= 70
    for heading in ("length", "perplexity", "loss", "±", *(("bits/byte", "windows", "tokens") if wide else ())):
        table.add_column(heading, justify="right", no_wrap=True)
    for result in results:
        if not result.windows:
            continue
        more = (_figure(result.bits_per_byte, 4), f"{result.windows:,}", f"{result.tokens:,}") if wide else ()
        table.add_row(
            _span(settings, result),
            _figure(result.perplexity, 3),
            _figure(result.loss, 4),
            _figure(result.standard_error, 4),
            *more,
        )
    console.print(table)
    for result in results:
        if result.note:
            say(f"{'Not finite' if result.windows else 'Skipped'}: {result.note}.")


def _values(settings: Settings) -> str:
    named = {"window": settings.window, "stride": settings.stride, "max tokens": settings.max_tokens}
    return "".join(f", {name} {value:,}" for name, value in named.items() if value is not None)


def _span(settings: Settings, result: LengthResult) -> str:
    """The length; for buckets, where it begins too."""
    low, high = result.positions
    return f"{0 if low == 1 else low}-{high}" if settings.protocol == "stream" else str(result.length)


def _figure(value: float | None, digits: int) -> str:
    if value is None or math.isnan(value):
        return "-"
    return f"{value:.{digits}f}" if value < 1e6 else f"{value:.3g}"


def _record(
    options: Perplexity,
    settings: Settings,
    model: SambaLM,
    tokenizer: Tokenizer | None,
    data: _Data,
    results: Sequence[LengthResult],
    seconds: float,
) -> dict[str, object]:
    from samba_lm.checkpoint import WEIGHTS
    from samba_lm.quantization import weight_bytes

    weights = _resolved(options.checkpoint) / WEIGHTS
    return {
        "checkpoint": weights.parent,
        "weights_sha256": file_sha256(weights) if weights.is_file() else None,
        "model": model.config.to_dict(),
        "tokenizer": None if tokenizer is None else tokenizer.fingerprint(),
        "data": data.facts,
        "settings": asdict(settings),
        "meaning": MEANING[settings.protocol],
        "batch": options.batch,
        "device": str(model.device),
        "dtype": str(model.dtype).removeprefix("torch."),
        "quantized": model.quantized,
        "weight_bytes": weight_bytes(model),
        "seconds": seconds,
        "results": [asdict(result) for result in results],
    }


@contextmanager
def _progress() -> Iterator[Callable[[int, int], None]]:
    """Yield a function to be told of the tokens read; draws a bar on stderr, if that is a terminal."""
    columns = (TextColumn("measuring"), BarColumn(), TaskProgressColumn(), TimeRemainingColumn())
    console = Console(stderr=True)
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as progress:
        task = progress.add_task("measuring", total=None)
        yield lambda done, total: progress.update(task, completed=done, total=total)
