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

import hashlib
import os
import re
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, BinaryIO

import numpy as np
from pydantic import BaseModel, ConfigDict, NonNegativeInt, PositiveInt, ValidationError

from samba_lm.errors import UserError
from samba_lm.files import read_json, recover_folder
from samba_lm.tokenizer import CONFIG_FILE, TOKENIZER_FILE, Tokenizer, load_tokenizer

if TYPE_CHECKING:
    from numpy.typing import NDArray

FORMAT = "samba-lm tokens"
VERSION = 1
META_FILE = "meta.json"
DEFAULT_SHARD_TOKENS = 2**26
_OUR_FILES = re.compile(
    "|".join([*map(re.escape, (META_FILE, TOKENIZER_FILE, CONFIG_FILE)), r"(tokens|offsets)-\d{5,}\.npy"])
)
_VERIFY_BLOCK = 2**24
_AGAIN = "make the data again with `samba-lm data prepare`, or copy it again"


class ShardMeta(BaseModel):
    """Counts, sizes in bytes and sha256 (hex) of one shard's two files."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    tokens: PositiveInt
    documents: PositiveInt
    tokens_bytes: PositiveInt
    tokens_sha256: str
    offsets_bytes: PositiveInt
    offsets_sha256: str


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

    Open it with :meth:`open`, which checks the folder.
    """

    def __init__(
        self,
        folder: Path,
        meta: Meta,
        tokenizer: Tokenizer,
        tokens: list[NDArray[np.unsignedinteger]],
        offsets: list[NDArray[np.int64]],
    ) -> None:
        self.folder = folder
        self.meta = meta
        self.tokenizer = tokenizer
        self._tokens = tokens
        self._offsets = offsets
        # Where each shard starts in the stream of tokens, and in the list of documents.
        self._token_base = np.cumsum([0] + [shard.tokens for shard in meta.shards])
        self._document_base = np.cumsum([0] + [shard.documents for shard in meta.shards])

    @classmethod
    def open(cls, folder: str | os.PathLike[str]) -> TokenDataset:
        """Open a folder made by ``samba-lm data prepare``; reads no tokens yet.

        Raises:
            UserError: a file is missing, foreign, cut short, or of another size or version.
        """
        folder = Path(folder)
        _recover(folder)
        meta = _read_meta(folder)
        tokenizer = load_tokenizer(folder)
        if tokenizer.fingerprint() != meta.tokenizer:
            raise UserError(f"{folder} holds another tokenizer than the one that made its tokens: {_AGAIN}.")
        tokens = []
        offsets = []
        for number, shard in enumerate(meta.shards):
            path = folder / offsets_file(number)
            starts = _map(path, shard.offsets_bytes, np.dtype("<i8"), shard.documents + 1)
            if starts[0] != 0 or starts[-1] != shard.tokens:
                raise UserError(f"{path} does not fit its shard of {shard.tokens} tokens: {_AGAIN}.")
            offsets.append(starts)
            path = folder / tokens_file(number)
            tokens.append(_map(path, shard.tokens_bytes, token_dtype(meta.vocab_size), shard.tokens))
        return cls(folder, meta, tokenizer, tokens, offsets)

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
            part = self._tokens[shard][at : at + out.size - done]
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
        start, stop = (int(offset) for offset in self._offsets[shard][at : at + 2])
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
        for shard in range(first, len(self._offsets)):
            base = int(self._token_base[shard])
            if base >= stop:
                break
            ends = self._offsets[shard][1:]
            # The last token of a document stands one before the next one's start.
            low, high = np.searchsorted(ends, [start - base + 1, stop - base + 1])
            last = np.asarray(ends[low:high]) - 1
            within = (last >= max(start - base, 0)) & (last < min(stop - base, self.meta.shards[shard].tokens))
            if not within.all() or (self._tokens[shard][last] != self.meta.eos_id).any():
                raise self._damaged("a document does not end where it says")
            found.append(last + base)
        return np.concatenate(found) if found else np.empty(0, dtype=np.int64)

    def _damaged(self, what: str) -> UserError:
        return UserError(
            f"{self.folder} is damaged ({what}): `samba-lm data verify {self.folder}` names the file; {_AGAIN}."
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
            tokens, offsets = self._tokens[number], self._offsets[number]
            for name, expected in (
                (tokens_file(number), shard.tokens_sha256),
                (offsets_file(number), shard.offsets_sha256),
            ):
                actual = file_sha256(self.folder / name)
                if actual != expected:
                    raise UserError(
                        f"{self.folder / name} was changed: its sha256 is {actual[:12]}..., not {expected[:12]}...; "
                        f"{_AGAIN}."
                    )
            if (np.diff(offsets) < 1).any() or (tokens[offsets[1:] - 1] != self.meta.eos_id).any():
                raise UserError(
                    f"{self.folder / offsets_file(number)}: a document does not end where it says; {_AGAIN}."
                )
            for start in range(0, shard.tokens, _VERIFY_BLOCK):
                block = tokens[start : start + _VERIFY_BLOCK]
                if block.max() >= self.meta.vocab_size:
                    raise UserError(
                        f"{self.folder / tokens_file(number)} has the token id {block.max()}, outside the vocabulary "
                        f"of {self.meta.vocab_size}: {_AGAIN}."
                    )
                done += block.size
                if progress:
                    progress(done, self.num_tokens)


def open_splits(folder: str | os.PathLike[str]) -> tuple[TokenDataset, TokenDataset | None]:
    """Open ``folder/train`` and ``folder/val`` where they are, else ``folder`` itself and no validation data.

    Raises:
        UserError: see :meth:`TokenDataset.open`.
    """
    folder = Path(folder)
    _recover(folder)
    if not _has_splits(folder):
        return TokenDataset.open(folder), None
    return TokenDataset.open(folder / "train"), TokenDataset.open(folder / "val")


def is_dataset(folder: Path) -> bool:
    """Whether ``folder`` is a data set or a pair of splits (whole or damaged): something ``prepare`` wrote."""
    return (folder / META_FILE).is_file() or _has_splits(folder)


def foreign_file(folder: Path) -> Path | None:
    """The first file or folder in a data set, or in a pair of splits, that ``prepare`` does not write."""
    for path in sorted(folder.iterdir()):
        if path.is_dir() and path.name in ("train", "val") and not path.is_symlink():
            if (foreign := foreign_file(path)) is not None:
                return foreign
        elif path.is_dir() or not _OUR_FILES.fullmatch(path.name):
            return path
    return None


def file_sha256(path: Path) -> str:
    """Return the sha256 (hex) of a file, read in blocks."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


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


def _has_splits(folder: Path) -> bool:
    return (folder / "train" / META_FILE).is_file() and (folder / "val").is_dir()


def _read_meta(folder: Path) -> Meta:
    file = folder / META_FILE
    if not file.is_file():
        if _has_splits(folder):
            raise UserError(f"{folder} holds two data sets: name {folder / 'train'} or {folder / 'val'}.")
        what = "has no meta.json, so it is not prepared data" if folder.is_dir() else "is not a folder"
        raise UserError(f"{folder} {what}: make it with `samba-lm data prepare TEXT... --out {folder}`.")
    content = read_json(file)
    if not isinstance(content, dict) or content.get("format") != FORMAT:
        raise UserError(f"{file} is not of the format {FORMAT!r}: give a folder made by `samba-lm data prepare`.")
    if content.get("version") != VERSION:
        raise UserError(
            f"{file} is of version {content.get('version')!r}, and this samba-lm reads version {VERSION}: "
            "prepare the data again."
        )
    try:
        meta = Meta.model_validate_json(file.read_bytes())
    except ValidationError as error:
        first = error.errors()[0]
        key = ".".join(str(part) for part in first["loc"])
        raise UserError(f"{file} is damaged at {key!r} ({first['msg']}): {_AGAIN}.") from error
    if (
        meta.dtype != token_dtype(meta.vocab_size).name
        or meta.tokens != sum(shard.tokens for shard in meta.shards)
        or meta.documents != sum(shard.documents for shard in meta.shards)
    ):
        raise UserError(f"{file} contradicts itself (dtype or counts): {_AGAIN}.")
    return meta


def _map(path: Path, size: int, dtype: np.dtype, length: int) -> NDArray:
    """Memory-map one array after checking that it is the file ``meta.json`` speaks of."""
    if not path.is_file():
        raise UserError(f"{path} is missing: {_AGAIN}.")
    actual = path.stat().st_size
    if actual != size:
        raise UserError(f"{path} has {actual} bytes, not the {size} of meta.json (cut short or changed): {_AGAIN}.")
    try:
        array: NDArray = np.load(path, mmap_mode="r", allow_pickle=False)
    except (ValueError, EOFError) as error:
        raise UserError(f"{path} is not an array of tokens ({error}): {_AGAIN}.") from error
    if array.dtype != dtype or array.shape != (length,):
        raise UserError(
            f"{path} holds {array.dtype} {list(array.shape)}, not the {dtype} [{length}] of meta.json: {_AGAIN}."
        )
    return array


def _write_header(file: BinaryIO, dtype: np.dtype, length: int) -> None:
    # numpy pads the header so that a longer length fits the same space: it is written again when the shard ends.
    np.lib.format.write_array_header_1_0(
        file, {"descr": np.lib.format.dtype_to_descr(dtype), "fortran_order": False, "shape": (length,)}
    )
