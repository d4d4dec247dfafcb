"""``samba-lm eval perplexity``: checkpoints' perplexity against context length, as a table, a figure and JSON."""

from __future__ import annotations

import contextlib
import dataclasses
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import numpy as np
import tyro
from rich.console import Console
from tyro.conf import UseAppendAction

from samba_lm.cli.eval import (
    Checkpoints,
    Lengths,
    Output,
    OutputOptions,
    about,
    check_checkpoints,
    label,
    progress,
    resolved,
)
from samba_lm.cli.model import CheckpointName, Runtime, RuntimeOptions, load
from samba_lm.cli.parse import parse
from samba_lm.cli.perplexity_results import Measured, PerplexityResults
from samba_lm.cli.perplexity_table import print_changes, print_lengths, print_models, say
from samba_lm.cli.results import Model
from samba_lm.data.shards import TokenDataset, is_dataset, open_splits
from samba_lm.data.sources import OnError, ReadOptions, find_files
from samba_lm.errors import UserError
from samba_lm.eval.protocols import MEANING, OF_DOCUMENTS, Protocol, Settings
from samba_lm.eval.protocols import Documents as Chosen

if TYPE_CHECKING:
    from samba_lm.eval.losses import OnProgress
    from samba_lm.eval.perplexity import LengthResult
    from samba_lm.eval.text import Tokens
    from samba_lm.model import SambaLM
    from samba_lm.tokenizer import Tokenizer

PROG = "samba-lm eval perplexity"


@dataclass(frozen=True)
class Perplexity:
    checkpoints: Checkpoints
    """Checkpoint folders, or training runs' (their newest steps)."""
    data: Annotated[tuple[Path, ...], tyro.conf.arg(metavar="FOLDER|FILE ...")]
    """One folder made by `samba-lm data prepare` (of train and val, val), or text files and folders of them."""
    lengths: Lengths = (512, 1024, 2048, 4096, 8192)
    """Context lengths in tokens; 4K are 4096."""
    protocol: Protocol = "full-window"
    """What is measured: see above. Figures of two protocols are not comparable."""
    stride: int | None = None
    """Tokens between windows, or scored in each: see above."""
    window: int | None = None
    """Of sliding-window: most tokens read at once; by default the length trained on, if checkpoints tell."""
    documents: Chosen = "same"
    """Of prefix and stream: measure all lengths on the same documents, or each on every one that is long enough."""
    against: CheckpointName | None = None
    """One of the checkpoints: tell how the others differ from it window by window, which is much more exact."""
    max_tokens: int | None = None
    """Stop after about so many tokens of text at each length, to bound the time; one window is always read."""
    batch: int | None = None
    """Windows read at once; by default as many as make 2,048 tokens (32,768 on a GPU). Changes no result."""
    field: str = "text"
    """Of text files: the text's field in JSON lines, or column in Parquet."""
    suffix: UseAppendAction[tuple[str, ...]] = ()
    """Of text files: take this ending too from folders, as plain text, such as .py; may be given several times."""
    errors: OnError = "strict"
    """Of text files, on bytes that are not UTF-8: stop and say where, or put the replacement character there."""
    runtime: RuntimeOptions = dataclasses.field(default_factory=Runtime)
    output: OutputOptions = dataclasses.field(default_factory=Output)


DESCRIPTION = "Measure perplexity against context length L, by one of these protocols:\n\n" + "\n\n".join(
    f"{name}: {meaning}" for name, meaning in MEANING.items()
)


def main(argv: list[str]) -> None:
    """Run ``samba-lm eval perplexity`` with these arguments (the first is ``perplexity``)."""
    options = parse(Perplexity, argv[1:], prog=PROG, description=DESCRIPTION)
    # Mistakes in the settings, the files' names and the checkpoints are told before anything is read.
    options.output.check()
    check_checkpoints(options.checkpoints, tokenizer=False)
    if options.against is not None and options.against not in options.checkpoints:
        raise UserError(f"--against {options.against} is none of the checkpoints: give it among them too.")
    settings = _settings(options)
    source = _Source(options)
    from samba_lm.eval.perplexity import measure  # only now: --help should not wait for torch

    output, runtime, names = options.output, options.runtime, options.checkpoints
    results: PerplexityResults | None = None
    models: list[Model] = []
    console = Console()
    with contextlib.ExitStack() as stack:
        for i, name in enumerate(names):
            model, tokenizer = load(name, runtime.device, runtime.dtype, runtime.quantize, runtime.adapter)
            data = source.of(name, tokenizer)
            if results is None:
                results = stack.enter_context(PerplexityResults(output.json, settings, data.sha256, data.facts))
                stack.callback(_print, console, settings, results, models, names)  # also where it was broken off
            models.append(_about(name, model, tokenizer, runtime.adapter, data))
            kept = {item.result.length for item in results.of(models[-1])}
            shown = label(name, names)
            with progress(shown if len(names) == 1 else f"{shown} ({i + 1} of {len(names)})") as tell:
                found = measure(
                    model,
                    data.tokens,
                    settings,
                    without=kept,
                    tokenizer=tokenizer,
                    batch=options.batch,
                    progress=_share(tell),
                )
                for result in found:
                    results.add(models[-1], Measured(result, data.names_at(result.starts, settings)))
                    results.save()  # the next one may take long
            if kept:
                many = f"{len(kept)} of {len(settings.lengths)} lengths were measured before"
                say(console, f"{many}." if len(names) == 1 else f"{shown}: {many}.")
    assert results is not None
    if options.against is not None and len(names) > 1:
        _print_changes(console, settings, results, models, options.against, names)
    if output.csv is not None:
        results.write_csv(output.csv, models)
    if output.figure is not None:
        _draw(output.figure, settings, results, models, names)
    _check_finite(results, models)


def _share(tell: Callable[[float], None]) -> OnProgress:
    return lambda read, total: tell(read / total)


def _settings(options: Perplexity) -> Settings:
    window = options.window
    if options.protocol == "sliding-window" and window is None:
        trained = {name: trained_length(resolved(name)) for name in options.checkpoints}
        unknown = [name for name, length in trained.items() if length is None]
        if unknown:
            raise UserError(f"{unknown[0]} does not tell the length it was trained on: give it with --window N.")
        if len(set(trained.values())) > 1:
            told = ", ".join(f"{name} {length}" for name, length in trained.items())
            raise UserError(f"The checkpoints were trained on different lengths ({told}): give one with --window N.")
        window = trained[options.checkpoints[0]]
    return Settings.of(
        options.protocol,
        options.lengths,
        stride=options.stride,
        window=window,
        max_tokens=options.max_tokens,
        documents=options.documents,
    )


def trained_length(folder: Path) -> int | None:
    """Tokens of a training row, where the checkpoint is one of our runs'."""
    if not (folder / "trainer.json").is_file():
        return None
    from samba_lm.train.checkpoints import read_state

    return int(read_state(folder).recipe["train"]["length"])


@dataclass(frozen=True)
class _Data:
    """What is measured with one tokenizer, and the facts that identify it.

    Attributes:
        sha256: the same where the text is, whatever the tokenizer.
        facts: of the text, whatever the tokenizer.
        mine: more facts, with this tokenizer.
        names: of the documents, where they have names.
        begins: where documents begin in the stream.
    """

    tokens: Tokens
    sha256: str
    facts: dict[str, object]
    mine: dict[str, object]
    names: Sequence[str]
    begins: np.ndarray

    def names_at(self, starts: Sequence[int], settings: Settings) -> tuple[str, ...]:
        """The names of the documents that begin at these places, where the protocol reads documents."""
        if settings.protocol not in OF_DOCUMENTS:
            return ()
        places = np.searchsorted(self.begins, starts)
        return tuple(self.names[i] if self.names else f"document {i + 1}" for i in places)


class _Source:
    """What ``--data`` names, as tokens of one tokenizer after the other."""

    def __init__(self, options: Perplexity) -> None:
        self._options = options
        self._read: tuple[str, _Data] | None = None
        prepared = [path for path in options.data if is_dataset(path)]
        if prepared and len(options.data) > 1:
            raise UserError(
                f"--data {prepared[0]} is prepared data, and {len(options.data) - 1} more were given: give it alone, "
                "or text files only."
            )
        self._dataset: TokenDataset | None = None
        if prepared:
            first, held_out = open_splits(prepared[0])
            self._dataset = held_out or first
        else:
            self._files = find_files(options.data, options.suffix)

    def of(self, name: str, tokenizer: Tokenizer | None) -> _Data:
        """The tokens for the checkpoint of this name; encoded once for checkpoints that follow one another."""
        if self._dataset is not None:
            return self._open(self._dataset, name, tokenizer)
        if tokenizer is None:
            raise UserError(
                f"{name} has no tokenizer to read text with: give data prepared with the model's tokenizer."
            )
        if self._read is None or self._read[0] != tokenizer.fingerprint():
            self._read = tokenizer.fingerprint(), self._encode(tokenizer)
        return self._read[1]

    def _open(self, dataset: TokenDataset, name: str, tokenizer: Tokenizer | None) -> _Data:
        if tokenizer is not None and dataset.tokenizer.fingerprint() != tokenizer.fingerprint():
            raise UserError(
                f"{dataset.folder} was made with another tokenizer than that of {name}: prepare the text again with "
                f"--tokenizer {name}, or give the text files themselves."
            )
        digest = dataset.meta_sha256
        facts: dict[str, object] = {"paths": [str(dataset.folder)], "documents": dataset.num_documents}
        mine: dict[str, object] = {"tokens": dataset.num_tokens, "tokenizer": dataset.tokenizer.fingerprint()}
        ends = dataset.document_ends(0, dataset.num_tokens) + 1
        return _Data(dataset, digest, facts, mine, (), np.append(0, ends[:-1]))

    def _encode(self, tokenizer: Tokenizer) -> _Data:
        from samba_lm.eval.text import Documents

        options = self._options
        how = ReadOptions(field=options.field, errors=options.errors)
        with progress("reading the text") as tell:
            read = Documents.read(self._files, tokenizer, how, tell)
        sizes = [document.size for document in read.tokens]
        facts: dict[str, object] = {
            "paths": [str(path) for path in options.data],
            "files": len(self._files),
            "documents": len(read.tokens),
            "bytes": read.text_bytes,
        }
        mine: dict[str, object] = {"tokens": sum(sizes), "tokenizer": tokenizer.fingerprint()}
        return _Data(read.tokens, read.sha256, facts, mine, read.names, np.append(0, np.cumsum(sizes)[:-1]))


def _about(name: str, model: SambaLM, tokenizer: Tokenizer | None, adapter: Path | None, data: _Data) -> Model:
    from samba_lm.quantization import weight_bytes

    facts = about(name, model, tokenizer, adapter)
    trained = trained_length(Path(str(facts["checkpoint"])))
    return {**facts, "weight_bytes": weight_bytes(model), "trained_length": trained, "text": data.mine}


def _print(
    console: Console, settings: Settings, results: PerplexityResults, models: Sequence[Model], names: Sequence[str]
) -> None:
    found = {_title(facts, names): _results(results, facts) for facts in models}
    if not any(found.values()):
        return  # it was broken off before anything was measured
    if len(names) == 1:
        for title, rows in found.items():
            print_lengths(console, title, settings, rows)
    elif found:
        print_models(console, settings, found, bits=_tokenizers(models) > 1)


def _print_changes(
    console: Console,
    settings: Settings,
    results: PerplexityResults,
    models: Sequence[Model],
    against: str,
    names: Sequence[str],
) -> None:
    base = next(facts for facts in models if facts["name"] == against)
    alike = [facts for facts in models if facts["tokenizer"] == base["tokenizer"]]
    print_changes(
        console, settings, {_title(facts, names): _results(results, facts) for facts in alike}, _title(base, names)
    )
    for facts in models:
        if facts not in alike:
            say(console, f"{_title(facts, names)} has another tokenizer, so its windows are not the same text.")


def _results(results: PerplexityResults, facts: Model) -> list[LengthResult]:
    return [item.result for item in results.of(facts)]


def _title(facts: Model, names: Sequence[str]) -> str:
    name = str(facts["name"])
    shown = name if len(names) == 1 else label(name, names)
    return shown if facts["quantized"] is None else f"{shown} in {facts['quantized']}"


def _tokenizers(models: Sequence[Model]) -> int:
    """How many tokenizers the models have: of two, figures a token are not comparable."""
    return len({facts["tokenizer"] for facts in models} - {None})


def _draw(
    path: Path, settings: Settings, results: PerplexityResults, models: Sequence[Model], names: Sequence[str]
) -> None:
    from samba_lm.eval.perplexity_figure import Line, draw
    from samba_lm.figures import save_figure

    lines = []
    for facts in models:
        trained = facts["trained_length"]
        known = trained if isinstance(trained, int) else None
        lines.append(Line(_title(facts, names), _results(results, facts), known))
    save_figure(path, draw(settings.protocol, lines, bits=_tokenizers(models) > 1))


def _check_finite(results: PerplexityResults, models: Sequence[Model]) -> None:
    for facts in models:
        for result in _results(results, facts):
            if result.windows and math.isnan(result.loss):
                raise UserError(f"{facts['name']}: {result.note}.")
