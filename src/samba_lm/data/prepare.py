"""Text files to a data set: read, encode in several processes, write token shards; all or nothing.

The same input gives the same bytes, whatever the number of processes: pieces of text are cut by their content, encoded
anywhere, and written in the order of the input.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, closing
from dataclasses import dataclass
from pathlib import Path

from samba_lm.data.encode import encode_in_order
from samba_lm.data.hub import is_hub, parse_stream
from samba_lm.data.output import check_numbers, check_out, split_of
from samba_lm.data.shards import DEFAULT_SHARD_TOKENS, OUR_FILES, Meta, ShardWriter, TokenDataset, is_dataset
from samba_lm.data.sources import OnError, Piece, ReadOptions, Source, SourceFile, find_files
from samba_lm.errors import UserError
from samba_lm.files import atomic_folder, recover_folder
from samba_lm.tokenizer import BpeSpec, ByteTokenizer, Tokenizer, train_bpe

OnProgress = Callable[[str, int, int], None]
"""Called with what is being done, and the bytes of the input done and in all (0: not known)."""

BPE_SAMPLE_BYTES = 2**26
_COPY_TOKENS = 2**20


@dataclass(frozen=True)
class Prepared:
    """What :func:`prepare` made.

    Attributes:
        folder: the output.
        splits: the data sets in it: ``{"": ...}`` for the folder itself, or ``"train"`` and ``"val"``.
        tokenizer: the one used.
        files: how many files and streams were read.
        empty_documents: how many documents had only white space and were skipped.
        notes: sentences on what was not done to the letter, for people.
    """

    folder: Path
    splits: dict[str, Meta]
    tokenizer: Tokenizer
    files: int
    empty_documents: int
    notes: tuple[str, ...]


def prepare(
    inputs: Sequence[str | os.PathLike[str]],
    out: str | os.PathLike[str],
    tokenizer: Tokenizer | BpeSpec,
    *,
    processes: int = 1,
    errors: OnError = "strict",
    field: str = "text",
    suffixes: Sequence[str] = (),
    take: int | None = None,
    val_fraction: float = 0.0,
    shard_tokens: int = DEFAULT_SHARD_TOKENS,
    overwrite: bool = False,
    progress: OnProgress | None = None,
) -> Prepared:
    """Turn text files into a data set at ``out``, or nothing on any error or interrupt.

    Args:
        inputs: files and folders (see :func:`samba_lm.data.sources.find_files`), and data sets to stream, which come
            after the files (``hf:NAME[:CONFIG][:SPLIT]``, see :mod:`samba_lm.data.hub`).
        out: the folder to make.
        tokenizer: the one to use, or a BPE to train on a sample of the inputs (at most about 64 MiB of them).
        processes: how many encode at once. They are spawned, so a script that asks for more than one must guard its
            top level by ``if __name__ == "__main__"``. Bytes need no encoding: one process does it.
        errors: on bytes that are not UTF-8: "strict" stops, "replace" puts U+FFFD there.
        field: the text's key in JSON lines, or its column in Parquet.
        suffixes: of more files to take from folders, as plain text (".py").
        take: how many rows of each stream, the first ones; None: all.
        val_fraction: of the documents, chosen by a hash of their text, go to ``out/val`` and the others to
            ``out/train``. Where that leaves one empty, the end of the data is taken instead, and a note says so.
        shard_tokens: a shard ends with the document that reaches this many tokens.
        overwrite: replace a data set that is already there.
        progress: told the bytes done.

    Raises:
        UserError: bad input (see :mod:`samba_lm.data.sources`), no text, or ``out`` may not be written.
    """
    if not os.fspath(out):
        raise UserError("The output folder's name is empty: name a folder to make.")
    out = Path(out)
    recover_folder(out)
    check_numbers(val_fraction, processes)
    sources = _sources(inputs, suffixes, take)
    paths = [source.path for source in sources if isinstance(source, SourceFile)]
    check_out(out, paths, overwrite, what="prepared data", is_ours=is_dataset, names=OUR_FILES)
    options = ReadOptions(field=field, errors=errors)
    if isinstance(tokenizer, ByteTokenizer):
        processes = 1  # bytes need no encoding: sending them around costs more
    notes: list[str] = []
    if isinstance(tokenizer, BpeSpec):
        tokenizer, notes = _train(tokenizer, sources, options, progress)
    with atomic_folder(out) as folder:
        empty, splits = _write(sources, options, folder, tokenizer, processes, val_fraction, shard_tokens, progress)
        if any(meta is None for meta in splits.values()):
            note, splits = _split_end(folder, splits, val_fraction, shard_tokens)
            notes.append(note)
        elif val_fraction:
            notes += _told_if_uneven(splits, val_fraction)
    return Prepared(out, {k: meta for k, meta in splits.items() if meta}, tokenizer, len(sources), empty, tuple(notes))


def _sources(inputs: Sequence[str | os.PathLike[str]], suffixes: Sequence[str], take: int | None) -> list[Source]:
    """The files to read, then the streams."""
    streams = [parse_stream(given, take) for given in inputs if is_hub(given)]
    if take is not None and not streams:
        raise UserError("How much to take is said of streams (hf:NAME), and there is none: leave --take out.")
    paths = [given for given in inputs if not is_hub(given)]
    return [*(find_files(paths, suffixes) if paths or not streams else ()), *dict.fromkeys(streams)]


def _train(
    spec: BpeSpec, sources: Sequence[Source], options: ReadOptions, progress: OnProgress | None
) -> tuple[Tokenizer, list[str]]:
    total = sum(_sampled_size(source) for source in sources)
    fraction = min(1.0, BPE_SAMPLE_BYTES / max(total, 1))
    tokenizer = train_bpe(_sample(sources, options, fraction, progress), spec.vocab_size)
    notes = []
    if any(source.size is None for source in sources):
        notes.append(f"The BPE was trained on the beginnings of the input, {BPE_SAMPLE_BYTES / 1e6:,.0f} MB at most.")
    elif fraction < 1:
        notes.append(f"The BPE was trained on the first {fraction:.1%} of the input's bytes, taken file by file.")
    if tokenizer.vocab_size < spec.vocab_size:
        notes.append(
            f"The text has too few repeated pairs for {spec.vocab_size} entries: the BPE has {tokenizer.vocab_size}."
        )
    return tokenizer, notes


def _sample(
    sources: Sequence[Source], options: ReadOptions, fraction: float, progress: OnProgress | None
) -> Iterator[str]:
    """Yield the beginnings of sources, spread evenly, until they make up ``fraction`` of all bytes."""
    total = sum(_sampled_size(source) for source in sources)
    seen = taken = 0
    for source in sources:
        seen += _sampled_size(source)
        base = taken
        # Many small files: some are passed over whole, so that the sample stays within its share.
        if taken >= fraction * seen:
            continue
        for piece in source.read(options):
            yield piece.text
            taken = base + piece.position
            if taken >= fraction * seen:
                break
        if progress:
            progress("training the BPE", seen, total)


def _sampled_size(source: Source) -> int:
    """Bytes; a stream counts as if it had as many as a sample."""
    return BPE_SAMPLE_BYTES if source.size is None else source.size


def _write(
    sources: Sequence[Source],
    options: ReadOptions,
    folder: Path,
    tokenizer: Tokenizer,
    processes: int,
    val_fraction: float,
    shard_tokens: int,
    progress: OnProgress | None,
) -> tuple[int, dict[str, Meta | None]]:
    """Write every document to its split; return the number of empty ones, and each split (None: got no document)."""
    sizes = [source.size for source in sources]
    total = 0 if None in sizes else sum(size for size in sizes if size is not None)
    empty = 0
    with ExitStack() as stack:
        writers = {}
        for name in ("train", "val") if val_fraction else ("",):
            (folder / name).mkdir(exist_ok=True)
            writers[name] = stack.enter_context(ShardWriter(folder / name, tokenizer, shard_tokens))
        writer = None  # of the current document
        texts = ((piece.text, (piece, done)) for piece, done in _read(sources, options))
        encoded = stack.enter_context(closing(encode_in_order(texts, tokenizer, processes)))
        for (piece, done), ids in encoded:
            if writer is None and piece.end and not piece.text.strip():
                empty += 1
                continue
            if writer is None:
                writer = writers[split_of(piece.text, val_fraction)]  # by its first piece, wherever it stands
            writer.append(ids, end=piece.end, text_bytes=len(piece.text.encode()))
            if piece.end:
                writer = None
            if progress:
                progress("encoding", done, total)
        if not any(writer.documents for writer in writers.values()):
            raise UserError(f"No text in the input: {sources[0]} and the others hold only white space.")
        return empty, {name: writer.close() if writer.documents else None for name, writer in writers.items()}


def _told_if_uneven(splits: dict[str, Meta | None], val_fraction: float) -> list[str]:
    """A note where the validation set has less than half or more than twice its share of the tokens: few documents, or
    long ones among them, are not set aside in the share that was asked for."""
    tokens = {name: meta.tokens for name, meta in splits.items() if meta}
    share = tokens["val"] / sum(tokens.values())
    if val_fraction / 2 <= share <= 2 * val_fraction:
        return []
    count = sum(meta.documents for meta in splits.values() if meta)
    return [
        f"The validation set has {share:.1%} of the tokens, not {val_fraction:.1%}: documents ({count:,} here) are set "
        "aside whole, chosen by a hash of their text. More and shorter documents, or another fraction, come closer."
    ]


def _read(sources: Sequence[Source], options: ReadOptions) -> Iterator[tuple[Piece, int]]:
    """Yield each piece and how many bytes of all sources have been read by then."""
    base = 0
    for source in sources:
        done = 0
        for piece in source.read(options):
            done = piece.position
            yield piece, base + done
        base += done if source.size is None else source.size


def _split_end(
    folder: Path, splits: dict[str, Meta | None], val_fraction: float, shard_tokens: int
) -> tuple[str, dict[str, Meta | None]]:
    """Split anew where hashing left one side empty: the last ``val_fraction`` of the tokens become the validation set.

    One document is cut inside; of several, the documents that end the data are taken whole.
    """
    filled = next(name for name, meta in splits.items() if meta)
    whole = folder / "whole"
    os.replace(folder / filled, whole)
    dataset = TokenDataset.open(whole)
    metas: dict[str, Meta | None] = {}
    bounds = [dataset.document_bounds(i) for i in range(dataset.num_documents)]
    if len(bounds) == 1:
        # Parts of the document without its separator, which the writer puts at each part's end.
        length = dataset.num_tokens - 1
        if length < 2:
            raise UserError(f"The text has {length} token: too little to set val_fraction {val_fraction} of it aside.")
        at = min(max(round(length * (1 - val_fraction)), 1), length - 1)
        parts = {"train": [(0, at)], "val": [(at, length)]}
        note = f"There is only one document: the last {length - at:,} of its {length:,} tokens are the validation set."
    else:
        target = dataset.num_tokens * (1 - val_fraction)
        first = min(range(1, len(bounds)), key=lambda i: abs(bounds[i][0] - target))
        spans = [(start, stop - 1) for start, stop in bounds]
        parts = {"train": spans[:first], "val": spans[first:]}
        note = (
            f"Among {len(bounds)} documents the hash chose none or all for a validation fraction of {val_fraction}: "
            f"the last {len(bounds) - first} are the validation set."
        )
    for name, documents in parts.items():
        (folder / name).mkdir(exist_ok=True)
        with ShardWriter(folder / name, dataset.tokenizer, shard_tokens) as writer:
            for start, stop in documents:
                _copy_document(dataset, start, stop, writer)
            metas[name] = writer.close()
    shutil.rmtree(whole)
    return note, metas


def _copy_document(dataset: TokenDataset, start: int, stop: int, writer: ShardWriter) -> None:
    for low in range(start, stop, _COPY_TOKENS):
        high = min(low + _COPY_TOKENS, stop)
        ids = dataset.tokens(low, high)
        # Read off the tokens: exact but for a character that a block's end cuts.
        writer.append(ids, end=high == stop, text_bytes=len(dataset.tokenizer.decode(ids).encode()))
