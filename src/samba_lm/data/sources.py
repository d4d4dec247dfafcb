"""Documents from files: plain text, JSON lines and Parquet, also compressed, read as a stream.

A document comes as pieces of at most ``PIECE_CHARS`` characters, so memory does not grow with a file. Where a long
document is cut depends on its text alone: where a word ends and white space follows, which is where byte-level BPE
begins a new word anyway, so that the cut cannot be seen in the tokens.
"""

from __future__ import annotations

import bz2
import codecs
import contextlib
import gzip
import io
import json
import lzma
import os
import re
import zlib
from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Literal, Protocol

from samba_lm.errors import UserError, did_you_mean

OnError = Literal["strict", "replace"]
Stream = IO[bytes] | gzip.GzipFile | lzma.LZMAFile | bz2.BZ2File

PIECE_CHARS = 2**18
TEXT_SUFFIXES = (".txt",)
JSONL_SUFFIXES = (".jsonl", ".ndjson")
PARQUET_SUFFIX = ".parquet"
PACKED_SUFFIXES = (".gz", ".xz", ".bz2", ".zst")
_BLOCK_BYTES = 2**18
_PARQUET_ROWS = 256
_REFUSED = {
    ".json": "write one JSON object a line into a .jsonl file",
    ".zip": "unpack it first and give the folder",
    ".tar": "unpack it first and give the folder",
    ".npy": "give the text it was made from",
}
_SURROGATE = re.compile("[\ud800-\udfff]")


@dataclass(frozen=True)
class Piece:
    """A part of a document.

    Attributes:
        text: valid Unicode; may be empty.
        end: whether the document ends here.
        position: how many bytes of the file (as it is on the disk) have been read.
    """

    text: str
    end: bool
    position: int


class Source(Protocol):
    """Where documents come from."""

    @property
    def size(self) -> int | None:
        """In bytes; None: not known."""
        ...

    def __str__(self) -> str: ...

    def read(self, options: ReadOptions) -> Iterator[Piece]:
        """Yield the documents, piece by piece. Raises UserError for what cannot be read."""
        ...


@dataclass(frozen=True)
class SourceFile:
    """A file to read: ``size`` bytes on the disk."""

    path: Path
    size: int

    def __str__(self) -> str:
        return str(self.path)

    def read(self, options: ReadOptions) -> Iterator[Piece]:
        """See :func:`read_file`."""
        return read_file(self, options)


@dataclass(frozen=True)
class ReadOptions:
    """How to read files.

    Attributes:
        field: the text's key in JSON lines, or its column in Parquet.
        errors: on bytes that are not UTF-8: "strict" stops, "replace" puts U+FFFD there.
    """

    field: str = "text"
    errors: OnError = "strict"


def find_files(inputs: Sequence[str | os.PathLike[str]], suffixes: Iterable[str] = ()) -> list[SourceFile]:
    """Return the files to read: those named, and those in the folders named, recursively and in sorted order.

    A named file is read whatever its suffix; in folders, files whose suffix is known (``.txt``, ``.jsonl``,
    ``.ndjson``, ``.parquet``, the first three also with ``.gz``, ``.xz``, ``.bz2`` or ``.zst``) or among ``suffixes``
    (read as plain text). Hidden files and folders are left out; a file found twice is read once.

    Raises:
        UserError: an input is missing or empty, a folder has nothing to read, or nothing was named.
    """
    known = (*TEXT_SUFFIXES, *JSONL_SUFFIXES, PARQUET_SUFFIX, *(_with_dot(suffix) for suffix in suffixes))
    found: dict[Path, SourceFile] = {}
    for given in inputs:
        if not os.fspath(given):
            raise UserError("The name of an input is empty: name a file or a folder (. is the current one).")
        path = Path(given)
        if path.is_dir():
            names = list(_walk(path))
            wanted = [name for name in names if _suffix(name) in known]
            if not wanted:
                raise UserError(_nothing_in(path, names, known))
        elif path.is_file():
            if path.stat().st_size == 0:
                raise UserError(f"{path} is empty: remove it from the inputs.")
            wanted = [path]
        elif path.exists():
            raise UserError(f"{path} is neither a file nor a folder: write its text into a file first.")
        else:
            raise UserError(f"{path} does not exist: check the name.")
        for name in wanted:
            found.setdefault(name.resolve(), SourceFile(name, name.stat().st_size))
    if not found:
        raise UserError("No input: name at least one file or folder.")
    return list(found.values())


def read_file(file: SourceFile, options: ReadOptions) -> Iterator[Piece]:
    """Yield the documents of one file, piece by piece.

    Raises:
        UserError: naming the file, and the byte, line or row, where the content is not what its suffix says; or
            pyarrow is needed and absent.
    """
    suffix = _suffix(file.path)
    if suffix in _REFUSED:
        raise UserError(f"{file.path} cannot be read: {_REFUSED[suffix]}.")
    if suffix == PARQUET_SUFFIX:
        if file.path.suffix.lower() != PARQUET_SUFFIX:
            raise UserError(f"{file.path} cannot be read: unpack the Parquet file first.")
        yield from _read_parquet(file, options)
        return
    with opened(file.path) as (raw, stream):
        if suffix in JSONL_SUFFIXES:
            yield from _read_jsonl(file, raw, stream, options)
        else:
            yield from _read_text(file, raw, stream, options)


@contextlib.contextmanager
def opened(path: Path) -> Iterator[tuple[IO[bytes], Stream]]:
    """A file's bytes as they lie, and unpacked as its suffix says (.gz, .xz, .bz2, .zst; others are the same twice).

    Raises UserError where it cannot be opened, where pyarrow is needed (.zst) and absent, and where reading finds it
    damaged.
    """
    try:
        with path.open("rb") as raw, contextlib.closing(_unpacked(path, raw)) as stream:
            yield raw, stream
    except (gzip.BadGzipFile, lzma.LZMAError, zlib.error, EOFError) as error:
        raise UserError(f"{path} is not a whole {path.suffix} file ({error}): copy it again.") from error
    except OSError as error:
        if "too much memory" in str(error):
            raise UserError(f"{path} was packed with a long window: unpack it first (zstd -d --long=31).") from error
        if error.errno is None:  # bz2's and pyarrow's own; the system's have a number
            raise UserError(f"{path} is not a whole {path.suffix} file ({error}): copy it again.") from error
        raise UserError(f"Cannot read {path}: {error.strerror or error}.") from error


def _unpacked(path: Path, raw: IO[bytes]) -> Stream:
    match path.suffix.lower():
        case ".gz":
            return gzip.open(raw)
        case ".xz":
            return lzma.open(raw)
        case ".bz2":
            return bz2.open(raw)
        case ".zst":
            return _zstd(path, raw)
    return raw


def _zstd(path: Path, raw: IO[bytes]) -> IO[bytes]:
    """By pyarrow, which finds a file's end missing; Python itself reads .zst from 3.14 on only."""
    try:
        import pyarrow as pa
    except ImportError as error:
        raise UserError(f'{path} needs pyarrow to be read: pip install "samba-lm[parquet]".') from error
    return io.BufferedReader(pa.CompressedInputStream(raw, "zstd"), _BLOCK_BYTES)


def _read_text(file: SourceFile, raw: IO[bytes], stream: Stream, options: ReadOptions) -> Iterator[Piece]:
    """The whole file is one document."""
    text = ""
    held = b""  # the first bytes of a character cut by the block's end
    offset = 0  # of `held` in the unpacked file
    while True:
        block = stream.read(_BLOCK_BYTES)
        data = held + block
        try:
            more, used = codecs.utf_8_decode(data, options.errors, not block)
        except UnicodeDecodeError as error:
            raise _not_utf8(file, error, offset) from error
        text += more.removeprefix("\ufeff") if offset == 0 else more  # a byte-order mark is no text
        offset += used
        held = data[used:]
        if not block:
            yield Piece(text, end=True, position=file.size)
            return
        if len(text) > PIECE_CHARS:
            *whole, text = cut(text)
            for piece in whole:
                yield Piece(piece, end=False, position=raw.tell())


def _read_jsonl(file: SourceFile, raw: IO[bytes], stream: Stream, options: ReadOptions) -> Iterator[Piece]:
    """Each line is an object with the document's text in one field."""
    offset = 0
    for number, line in enumerate(stream, start=1):
        try:
            decoded = line.decode("utf-8", options.errors)
        except UnicodeDecodeError as error:
            raise _not_utf8(file, error, offset, f" (line {number})") from error
        offset += len(line)
        if number == 1:
            decoded = decoded.removeprefix("\ufeff")
        if decoded.strip():
            text = _text_of(decoded, f"{file.path} line {number}", options)
            yield from pieces(text, raw.tell())


def _text_of(line: str, where: str, options: ReadOptions) -> str:
    try:
        record = json.loads(line)
    except json.JSONDecodeError as error:
        raise UserError(f"{where} is not valid JSON ({error.msg} at column {error.colno}): mend the line.") from error
    except RecursionError as error:
        raise UserError(f"{where} is nested too deeply: remove the line.") from error
    except ValueError as error:  # an integer of thousands of digits
        raise UserError(f"{where} has a number that is too long: remove the line.") from error
    if not isinstance(record, dict):
        raise UserError(f"{where} is not a JSON object: each line must be one, with the text in {options.field!r}.")
    if options.field not in record:
        raise UserError(
            f"{where} has no field {options.field!r}: name the text's field.{_known(options.field, record)}"
        )
    text = record[options.field]
    if not isinstance(text, str):
        raise UserError(f"{where}: field {options.field!r} is {json.dumps(text)[:40]}, not a text.")
    # JSON can spell half a surrogate pair ("\ud800"), which is no character.
    half = _SURROGATE.search(text)
    if half is None:
        return text
    if options.errors == "strict":
        raise UserError(
            f"{where}: field {options.field!r} has the lone surrogate U+{ord(half.group()):04X}, which is not Unicode "
            "text: mend it, or go on with --errors replace."
        )
    return _SURROGATE.sub("\ufffd", text)


def _read_parquet(file: SourceFile, options: ReadOptions) -> Iterator[Piece]:
    """Each row is a document; null is an empty one."""
    try:
        import pyarrow as pa
        import pyarrow.parquet as pq
    except ImportError as error:
        raise UserError(f'{file.path} needs pyarrow to be read: pip install "samba-lm[parquet]".') from error
    try:
        with pq.ParquetFile(file.path) as table:
            if options.field not in table.schema_arrow.names:
                hint = _known(options.field, table.schema_arrow.names)
                raise UserError(f"{file.path} has no column {options.field!r}: name the text's column.{hint}")
            row = 0
            rows = max(1, table.metadata.num_rows)
            for batch in table.iter_batches(batch_size=_PARQUET_ROWS, columns=[options.field]):
                column = batch.column(0)
                if pa.types.is_dictionary(column.type):
                    column = column.dictionary_decode()
                if not _is_text(column.type):
                    raise UserError(f"{file.path}: column {options.field!r} holds {column.type}, not text.")
                for value in column.cast(pa.large_binary()).to_pylist():
                    row += 1
                    try:
                        text = (value or b"").decode("utf-8", options.errors)
                    except UnicodeDecodeError as error:
                        raise _not_utf8(file, error, 0, f" of row {row}") from error
                    yield from pieces(text, file.size * row // rows)
    except pa.ArrowInvalid as error:
        raise UserError(f"{file.path} is not a whole Parquet file ({error}): copy it again.") from error
    except OSError as error:
        raise UserError(f"Cannot read {file.path}: {error}.") from error


def _is_text(kind: object) -> bool:
    import pyarrow as pa

    return kind in (pa.string(), pa.large_string(), pa.string_view(), pa.null())


def pieces(text: str, position: int) -> Iterator[Piece]:
    """A document that is at hand as a whole, in pieces."""
    *whole, last = cut(text)
    for piece in whole:
        yield Piece(piece, end=False, position=position)
    yield Piece(last, end=True, position=position)


def cut(text: str) -> list[str]:
    """Cut ``text`` into parts of at most ``PIECE_CHARS``, the last one with what remains; joined they give ``text``."""
    parts = []
    start = 0
    while len(text) - start > PIECE_CHARS:
        stop = _cut_point(text, start, start + PIECE_CHARS)
        parts.append(text[start:stop])
        start = stop
    return [*parts, text[start:]]


def _cut_point(text: str, start: int, stop: int) -> int:
    # Before white space that follows a letter or digit; rather at a line's end.
    for space in ("\n", " "):
        at = stop
        while (at := text.rfind(space, start + 1, at)) > 0:
            if text[at - 1].isalnum():
                return at
    return stop


def _walk(folder: Path) -> Iterator[Path]:
    for root, folders, names in os.walk(folder):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        for name in sorted(names):
            path = Path(root) / name
            if not name.startswith(".") and path.is_file():
                yield path


def _suffix(path: Path) -> str:
    """The suffix in lower case, without that of the packing: ``.txt`` for ``a.TXT.xz``."""
    suffix = path.suffix.lower()
    return Path(path.stem).suffix.lower() if suffix in PACKED_SUFFIXES else suffix


def _with_dot(suffix: str) -> str:
    return "." + suffix.lower().removeprefix(".")


def _nothing_in(folder: Path, names: list[Path], known: Sequence[str]) -> str:
    message = f"{folder} has no file to read (looked for {', '.join(known)})"
    texts = Counter(_suffix(name) for name in names if _suffix(name) not in _REFUSED and _looks_like_text(name))
    if not texts.pop("", None) and not texts:
        return f"{message}: check the name."
    if not texts:
        return f"{message}: name the files themselves."
    suffix, count = texts.most_common(1)[0]
    return f"{message}: to read its {count} {suffix} as plain text, add --suffix {suffix}."


def _looks_like_text(path: Path) -> bool:
    with path.open("rb") as file:
        start = file.read(1024)
    return b"\0" not in start


def _known(field: str, names: Collection[str]) -> str:
    return (did_you_mean(field, names) if names else "") + " Use --field NAME."


def _not_utf8(file: SourceFile, error: UnicodeDecodeError, offset: int, within: str = "") -> UserError:
    unpacked = " of the unpacked text" if file.path.suffix.lower() in PACKED_SUFFIXES else ""
    byte = f"byte {offset + error.start}{within}{unpacked} is 0x{error.object[error.start]:02x}"
    return UserError(
        f"{file.path} is not UTF-8: {byte}; convert the file, or go on with --errors replace, where there is that."
    )
