"""The format of prepared data: a folder of memory-mapped token arrays with document offsets.

::

    meta.json           format, version, counts, the tokenizer's fingerprint, size and sha256 of each file below
    tokenizer.json      (and tokenizer_config.json) the tokenizer that made the tokens
    tokens-00000.npy    uint16 (vocabularies up to 65,536) or uint32, [tokens of the shard], little-endian
    offsets-00000.npy   int64 [documents of the shard + 1]: where each document starts in the shard, then its end

Each document ends with the separator ``eos_id`` and lies in one shard. The data set is one stream of tokens: the shards
in order. Nothing in the folder depends on the time, the machine or the number of processes.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import json
import os
import re
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Annotated, Any, BinaryIO

import numpy as np
from pydantic import BaseModel, ConfigDict, NonNegativeInt, PositiveInt, StringConstraints, ValidationError

from samba_lm.data.cache import Cache
from samba_lm.data.folder import AGAIN, DataFolder, LocalFolder, ShardFile, file_sha256
from samba_lm.data.remote import META_NAME, RemoteFolder, data_folder
from samba_lm.errors import UserError
from samba_lm.files import recover_folder
from samba_lm.tokenizer import CONFIG_FILE, TOKENIZER_FILE, Tokenizer
from samba_lm.urls import Url

if TYPE_CHECKING:
    from numpy.typing import NDArray

FORMAT = "samba-lm tokens"
VERSION = 1
META_FILE = META_NAME
DEFAULT_SHARD_TOKENS = 2**26
OUR_FILES = re.compile(
    "|".join([*map(re.escape, (META_FILE, TOKENIZER_FILE, CONFIG_FILE)), r"(tokens|offsets)-\d{5,}\.npy"])
)
Sha256 = Annotated[str, StringConstraints(pattern="^[0-9a-f]{64}$")]
"""In hex. Copies of remote shards are files of this name, so it must be nothing that names another place."""
_VERIFY_BLOCK = 2**24
_OPEN_ARRAYS = 256
"""Memory-mapped at once: each takes one of the files that a process may have open, often 1,024."""


class ShardMeta(BaseModel):
    """Counts, sizes in bytes and sha256 (hex) of one shard's two files."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    tokens: PositiveInt
    documents: PositiveInt
    tokens_bytes: PositiveInt
    tokens_sha256: Sha256
    offsets_bytes: PositiveInt
    offsets_sha256: Sha256


class Meta(BaseModel):
    """The content of ``meta.json``."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    format: str = FORMAT
    version: int = VERSION
    tokenizer: str
    """The tokenizer's fingerprint."""
    vocab_size: PositiveInt
    eos_id: NonNegativeInt
    dtype: str
    tokens: PositiveInt
    documents: PositiveInt
    text_bytes: NonNegativeInt
    """Size of the text in UTF-8, separators not counted: tokens to bytes, for bits per byte."""
    shards: tuple[ShardMeta, ...]


class ShardWriter:
    """Writes a data set into an existing empty folder, piece by piece; memory does not grow with the data.

    The folder is not readable before :meth:`close` has written ``meta.json``.

    Args:
        folder: where to write; wrap it in :func:`samba_lm.files.atomic_folder`.
        tokenizer: the one that made the ids; saved with them.
        shard_tokens: a shard ends with the document that reaches this many tokens.
    """

    def __init__(self, folder: Path, tokenizer: Tokenizer, shard_tokens: int = DEFAULT_SHARD_TOKENS) -> None:
        if shard_tokens < 1:
            raise UserError(f"shard_tokens is {shard_tokens}: it must be at least 1.")
        self.documents = 0
        self.tokens = 0
        self._folder = folder
        self._tokenizer = tokenizer
        self._shard_tokens = shard_tokens
        self._dtype = token_dtype(tokenizer.vocab_size)
        self._text_bytes = 0
        self._shards: list[ShardMeta] = []
        self._file: BinaryIO | None = None
        self._offsets = [0]
        self._written = 0  # tokens in the open shard

    def append(self, ids: NDArray[np.int64], *, end: bool, text_bytes: int = 0) -> None:
        """Append ids ``[n]`` to the current document; ``end`` closes it with the separator.

        Raises:
            UserError: an id is outside the vocabulary.
        """
        vocab_size = self._tokenizer.vocab_size
        if ids.size and not (ids.min() >= 0 and ids.max() < vocab_size):
            bad = ids[(ids < 0) | (ids >= vocab_size)][0]
            raise UserError(
                f"Token id {bad} is outside the vocabulary 0..{vocab_size - 1}: the ids were made by another tokenizer."
            )
        if end:
            ids = np.append(ids, self._tokenizer.eos_id)
        if self._file is None:
            self._file = (self._folder / tokens_file(len(self._shards))).open("wb+")
            _write_header(self._file, self._dtype, 0)
        self._file.write(ids.astype(self._dtype).tobytes())
        self._written += ids.size
        self.tokens += ids.size
        self._text_bytes += text_bytes
        if end:
            self.documents += 1
            self._offsets.append(self._written)
            if self._written >= self._shard_tokens:
                self._close_shard()

    def close(self) -> Meta:
        """Finish the last shard, write the tokenizer and ``meta.json``, and return its content."""
        assert self._offsets[-1] == self._written, "the last document was not ended"
        assert self.documents, "a data set without documents"
        self._close_shard()
        self._tokenizer.save(self._folder)
        meta = Meta(
            tokenizer=self._tokenizer.fingerprint(),
            vocab_size=self._tokenizer.vocab_size,
            eos_id=self._tokenizer.eos_id,
            dtype=self._dtype.name,
            tokens=self.tokens,
            documents=self.documents,
            text_bytes=self._text_bytes,
            shards=tuple(self._shards),
        )
        (self._folder / META_FILE).write_text(meta.model_dump_json(indent=2) + "\n", encoding="utf-8")
        return meta

    def __enter__(self) -> ShardWriter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._file is not None:
            self._file.close()

    def _close_shard(self) -> None:
        if self._file is None:
            return
        self._file.seek(0)
        _write_header(self._file, self._dtype, self._written)
        self._file.close()
        self._file = None
        number = len(self._shards)
        tokens, offsets = self._folder / tokens_file(number), self._folder / offsets_file(number)
        np.save(offsets, np.array(self._offsets, dtype="<i8"), allow_pickle=False)
        self._shards.append(
            ShardMeta(
                tokens=self._written,
                documents=len(self._offsets) - 1,
                tokens_bytes=tokens.stat().st_size,
                tokens_sha256=file_sha256(tokens),
                offsets_bytes=offsets.stat().st_size,
                offsets_sha256=file_sha256(offsets),
            )
        )
        self._offsets, self._written = [0], 0


class TokenDataset:
    """A prepared data set, memory-mapped: one stream of ``num_tokens`` tokens in ``num_documents`` documents.

    Open it with :meth:`open`, which checks the folder. Shards are mapped as they are read, not all at once.
    """

    def __init__(self, files: DataFolder, meta: Meta, tokenizer: Tokenizer) -> None:
        self.files = files
        self.meta = meta
        self.tokenizer = tokenizer
        # Where each shard starts in the stream of tokens, and in the list of documents.
        self._token_base = np.cumsum([0] + [shard.tokens for shard in meta.shards])
        self._document_base = np.cumsum([0] + [shard.documents for shard in meta.shards])
        self._tokens = functools.lru_cache(maxsize=_OPEN_ARRAYS)(self._map_tokens)
        self._offsets = functools.lru_cache(maxsize=_OPEN_ARRAYS)(self._map_offsets)
        self._expected: tuple[Sequence[int], Sequence[int]] = ((), ())

    @classmethod
    def open(cls, folder: str | os.PathLike[str] | Url, cache: Cache | None = None) -> TokenDataset:
        """Open a folder made by ``samba-lm data prepare``, here or at a URL; reads no tokens yet.

        Args:
            folder: a path, or a URL of fsspec (``s3://bucket/data``).
            cache: where shards from a URL are kept; None: the usual one.

        Raises:
            UserError: a file is missing, foreign, cut short, or of another size or version. (At a URL a shard's content
                is looked at when it is read.)
        """
        files = data_folder(folder, cache)
        if isinstance(files, LocalFolder):
            _recover(files.path)
        meta = _read_meta(files)
        tokenizer = files.tokenizer()
        if tokenizer.fingerprint() != meta.tokenizer:
            raise UserError(f"{files} holds another tokenizer than the one that made its tokens: {AGAIN}.")
        dataset = cls(files, meta, tokenizer)
        if isinstance(files, LocalFolder):
            for number in range(len(meta.shards)):
                dataset._offsets(number)
                dataset._tokens(number)
        elif isinstance(files, RemoteFolder):
            files.check(dataset.shard_files(range(len(meta.shards))))
        return dataset

    @property
    def folder(self) -> Path | Url:
        return self.files.path

    @functools.cached_property
    def meta_sha256(self) -> str:
        """sha256 (hex) of ``meta.json``, which holds that of every shard."""
        return hashlib.sha256(self.files.small(META_FILE) or b"").hexdigest()

    def shard_files(self, numbers: Iterable[int], documents: bool = True) -> list[ShardFile]:
        """The files of these shards, in this order; without ``documents``, of the tokens alone."""
        found = []
        for number in numbers:
            shard, of = self.meta.shards[number], f"shard {number + 1} of {len(self.meta.shards)}"
            found.append(ShardFile(tokens_file(number), shard.tokens_bytes, shard.tokens_sha256, of))
            if documents:
                found.append(ShardFile(offsets_file(number), shard.offsets_bytes, shard.offsets_sha256, of))
        return found

    def shards_of(self, start: int, stop: int) -> range:
        """The shards that hold the tokens ``start .. stop - 1``, which are at least one."""
        first, last = np.searchsorted(self._token_base, [start, stop - 1], side="right") - 1
        return range(int(first), int(last) + 1)

    def expect(self, now: Sequence[int], later: Sequence[int], documents: bool = True) -> None:
        """These shards will be read, ``now`` and ``later``: they are fetched ahead, and others are let go."""
        if (now, later) != self._expected:
            self._expected = (now, later)
            self._tokens.cache_clear()
            self._offsets.cache_clear()
            self.files.ahead(self.shard_files([*now, *later], documents))

    def _map_tokens(self, number: int) -> NDArray[np.unsignedinteger]:
        (file,) = self.shard_files([number], documents=False)
        return self._mapped(file, token_dtype(self.meta.vocab_size), self.meta.shards[number].tokens)

    def _map_offsets(self, number: int) -> NDArray[np.int64]:
        shard, file = self.meta.shards[number], self.shard_files([number])[1]
        starts = self._mapped(file, np.dtype("<i8"), shard.documents + 1)
        if starts[0] != 0 or starts[-1] != shard.tokens:
            raise UserError(f"{self.folder / file.name} does not fit its shard of {shard.tokens} tokens: {AGAIN}.")
        return starts

    def _mapped(self, file: ShardFile, dtype: np.dtype, length: int) -> NDArray:
        return map_array(self.files.local(file), str(self.folder / file.name), dtype, length)

    @property
    def num_tokens(self) -> int:
        return self.meta.tokens

    @property
    def num_documents(self) -> int:
        return self.meta.documents

    def check_vocab(self, vocab_size: int) -> None:
        """Raise UserError unless every id fits a model of ``vocab_size``."""
        if self.meta.vocab_size > vocab_size:
            raise UserError(
                f"{self.folder} has token ids up to {self.meta.vocab_size - 1}, outside the model's vocabulary of "
                f"{vocab_size}: set the model's vocab_size to {self.meta.vocab_size} or more, or prepare the data with "
                "the model's tokenizer."
            )

    def tokens(self, start: int, stop: int) -> NDArray[np.int64]:
        """Return the tokens ``start .. stop - 1`` of the stream, int64 ``[stop - start]``, across shards.

        Raises:
            IndexError: not ``0 <= start <= stop <= num_tokens``.
            UserError: an id is outside the vocabulary, in damaged data.
        """
        if not 0 <= start <= stop <= self.num_tokens:
            raise IndexError(f"tokens {start}..{stop} are not within 0..{self.num_tokens}")
        out = np.empty(stop - start, dtype=np.int64)
        shard = int(np.searchsorted(self._token_base, start, side="right")) - 1
        done = 0
        while done < out.size:
            at = start + done - int(self._token_base[shard])
            part = self._tokens(shard)[at : at + out.size - done]
            out[done : done + part.size] = part
            done += part.size
            shard += 1
        if out.size and out.max() >= self.meta.vocab_size:
            raise self._damaged(f"the token id {out.max()} is outside the vocabulary of {self.meta.vocab_size}")
        return out

    def document_bounds(self, index: int) -> tuple[int, int]:
        """Return where document ``index`` starts and ends in the stream; its last token is the separator.

        Raises:
            IndexError: not ``0 <= index < num_documents``.
            UserError: the data are damaged.
        """
        if not 0 <= index < self.num_documents:
            raise IndexError(f"document {index} is not within 0..{self.num_documents - 1}")
        shard = int(np.searchsorted(self._document_base, index, side="right")) - 1
        at = index - int(self._document_base[shard])
        base = int(self._token_base[shard])
        start, stop = (int(offset) for offset in self._offsets(shard)[at : at + 2])
        if not 0 <= start < stop <= self.meta.shards[shard].tokens:
            raise self._damaged(f"document {index} has the bounds {start}..{stop}")
        return base + start, base + stop

    def document(self, index: int) -> NDArray[np.int64]:
        """Return the tokens of document ``index``, int64, its separator last."""
        return self.tokens(*self.document_bounds(index))

    def document_ends(self, start: int, stop: int) -> NDArray[np.int64]:
        """Return, int64 and rising, the stream positions within ``start .. stop - 1`` that end a document.

        Raises:
            UserError: the data are damaged.
        """
        found = []
        first = int(np.searchsorted(self._token_base, start, side="right")) - 1
        for shard in range(first, len(self.meta.shards)):
            base = int(self._token_base[shard])
            if base >= stop:
                break
            ends = self._offsets(shard)[1:]
            # The last token of a document stands one before the next one's start.
            low, high = np.searchsorted(ends, [start - base + 1, stop - base + 1])
            last = np.asarray(ends[low:high]) - 1
            within = (last >= max(start - base, 0)) & (last < min(stop - base, self.meta.shards[shard].tokens))
            if not within.all() or (self._tokens(shard)[last] != self.meta.eos_id).any():
                raise self._damaged("a document does not end where it says")
            found.append(last + base)
        return np.concatenate(found) if found else np.empty(0, dtype=np.int64)

    def _damaged(self, what: str) -> UserError:
        return UserError(
            f"{self.folder} is damaged ({what}): `samba-lm data verify {self.folder}` names the file; {AGAIN}."
        )

    def verify(self, progress: Callable[[int, int], None] | None = None) -> None:
        """Read everything: hashes, ids within the vocabulary, documents that end with the separator.

        Args:
            progress: called with tokens done and in all.

        Raises:
            UserError: what is wrong, and in which file.
        """
        done = 0
        for number, shard in enumerate(self.meta.shards):
            with contextlib.ExitStack() as stack:
                tokens_path, offsets_path = (
                    self._unchanged(file, stack.enter_context(self.files.as_it_lies(file)))
                    for file in self.shard_files([number])
                )
                dtype = token_dtype(self.meta.vocab_size)
                tokens = map_array(tokens_path, str(self.folder / tokens_file(number)), dtype, shard.tokens)
                where = str(self.folder / offsets_file(number))
                offsets = map_array(offsets_path, where, np.dtype("<i8"), shard.documents + 1)
                if (np.diff(offsets) < 1).any() or (tokens[offsets[1:] - 1] != self.meta.eos_id).any():
                    raise UserError(f"{where}: a document does not end where it says; {AGAIN}.")
                for start in range(0, shard.tokens, _VERIFY_BLOCK):
                    block = tokens[start : start + _VERIFY_BLOCK]
                    if block.max() >= self.meta.vocab_size:
                        raise UserError(
                            f"{self.folder / tokens_file(number)} has the token id {block.max()}, outside the "
                            f"vocabulary of {self.meta.vocab_size}: {AGAIN}."
                        )
                    done += block.size
                    if progress:
                        progress(done, self.num_tokens)

    def _unchanged(self, file: ShardFile, path: Path) -> Path:
        actual = file_sha256(path)
        if actual != file.sha256:
            raise UserError(
                f"{self.folder / file.name} was changed: its sha256 is {actual[:12]}..., not {file.sha256[:12]}...; "
                f"{AGAIN}."
            )
        return path


def open_splits(
    folder: str | os.PathLike[str] | Url, cache: Cache | None = None
) -> tuple[TokenDataset, TokenDataset | None]:
    """Open ``folder/train`` and ``folder/val`` where they are, else ``folder`` itself and no validation data.

    Raises:
        UserError: see :meth:`TokenDataset.open`.
    """
    files = data_folder(folder, cache)
    if isinstance(files, LocalFolder):
        _recover(files.path)
    if not _has_splits(files):
        return TokenDataset.open(files.path, cache), None
    return TokenDataset.open(files.path / "train", cache), TokenDataset.open(files.path / "val", cache)


def is_dataset(folder: Path) -> bool:
    """Whether ``folder`` is a data set or a pair of splits (whole or damaged): something ``prepare`` wrote."""
    return (folder / META_FILE).is_file() or _has_splits(LocalFolder(folder))


def token_dtype(vocab_size: int) -> np.dtype[np.unsignedinteger]:
    """Return uint16 for vocabularies up to 65,536, uint32 beyond, both little-endian."""
    return np.dtype("<u2") if vocab_size <= 2**16 else np.dtype("<u4")


def tokens_file(number: int) -> str:
    """Return the name of a shard's tokens."""
    return f"tokens-{number:05d}.npy"


def offsets_file(number: int) -> str:
    """Return the name of a shard's document offsets."""
    return f"offsets-{number:05d}.npy"


def _recover(folder: Path) -> None:
    # Splits are replaced together, by their parent's name.
    recover_folder(folder)
    if folder.name in ("train", "val"):
        recover_folder(folder.parent)


def _has_splits(files: DataFolder) -> bool:
    if isinstance(files, LocalFolder):
        return (files.path / "train" / META_FILE).is_file() and (files.path / "val").is_dir()
    # At a URL a folder is seen by what is in it; the usual case is asked for first.
    names = [f"{name}/{META_FILE}" for name in ("train", "val")]
    return files.small(META_FILE) is None and all(files.small(name) is not None for name in names)


def _read_meta(files: DataFolder) -> Meta:
    file = files.path / META_FILE
    text = files.small(META_FILE)
    if text is None:
        if _has_splits(files):
            raise UserError(f"{files} holds two data sets: name {files.path / 'train'} or {files.path / 'val'}.")
        if not isinstance(files, LocalFolder):
            raise UserError(
                f"{files} has no meta.json: check the address, or copy there what `samba-lm data prepare` made."
            )
        what = "has no meta.json, so it is not prepared data" if files.path.is_dir() else "is not a folder"
        raise UserError(f"{files} {what}: make it with `samba-lm data prepare TEXT... --out {files}`.")
    content = _parsed(text, str(file))
    if not isinstance(content, dict) or content.get("format") != FORMAT:
        raise UserError(f"{file} is not of the format {FORMAT!r}: give a folder made by `samba-lm data prepare`.")
    if content.get("version") != VERSION:
        raise UserError(
            f"{file} is of version {content.get('version')!r}, and this samba-lm reads version {VERSION}: "
            "prepare the data again."
        )
    try:
        meta = Meta.model_validate_json(text)
    except ValidationError as error:
        first = error.errors()[0]
        key = ".".join(str(part) for part in first["loc"])
        raise UserError(f"{file} is damaged at {key!r} ({first['msg']}): {AGAIN}.") from error
    if (
        meta.dtype != token_dtype(meta.vocab_size).name
        or meta.tokens != sum(shard.tokens for shard in meta.shards)
        or meta.documents != sum(shard.documents for shard in meta.shards)
    ):
        raise UserError(f"{file} contradicts itself (dtype or counts): {AGAIN}.")
    return meta


def _parsed(text: bytes, where: str) -> Any:
    try:
        return json.loads(text)
    except RecursionError:
        raise UserError(f"{where} is not valid: it is nested too deeply.") from None
    except ValueError as error:  # not UTF-8, not JSON, a number too long
        raise UserError(f"{where} is not valid JSON ({error}): it is damaged; {AGAIN}.") from None


def map_array(path: Path, where: str, dtype: np.dtype, length: int) -> NDArray:
    """Memory-map one array after checking that it is what ``meta.json`` speaks of; ``where``: its name for people."""
    try:
        array: NDArray = np.load(path, mmap_mode="r", allow_pickle=False)
    except (ValueError, EOFError) as error:
        raise UserError(f"{where} is not an array of tokens ({error}): {AGAIN}.") from error
    if array.dtype != dtype or array.shape != (length,):
        raise UserError(
            f"{where} holds {array.dtype} {list(array.shape)}, not the {dtype} [{length}] of meta.json: {AGAIN}."
        )
    return array


def _write_header(file: BinaryIO, dtype: np.dtype, length: int) -> None:
    # numpy pads the header so that a longer length fits the same space: it is written again when the shard ends.
    np.lib.format.write_array_header_1_0(
        file, {"descr": np.lib.format.dtype_to_descr(dtype), "fortran_order": False, "shape": (length,)}
    )
