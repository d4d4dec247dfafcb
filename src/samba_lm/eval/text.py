"""The text that is measured: one stream of tokens, in documents, wherever it is kept."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from typing import TYPE_CHECKING

import numpy as np

from samba_lm.data.shards import TokenDataset, token_dtype
from samba_lm.data.sources import ReadOptions, SourceFile, read_file
from samba_lm.errors import UserError
from samba_lm.tokenizer import Tokenizer

if TYPE_CHECKING:
    from numpy.typing import NDArray

    Tokens = NDArray[np.integer] | Sequence[NDArray[np.integer]] | TokenDataset
    """One document, several documents, or prepared data. Arrays are [tokens] of any integer type, or maps of a file."""

_DECODED_AT_ONCE = 1 << 16
"""Tokens."""
_ENCODED_AT_ONCE = 1 << 22
"""Characters."""


@dataclass(frozen=True)
class Text:
    """A stream of ``size`` tokens.

    Attributes:
        size: number of tokens.
        read: ``read(start, stop)`` gives tokens ``start .. stop - 1``.
        ends_of: gives where each document ends, int64 [documents], rising to ``size``; asked for only when needed.
    """

    size: int
    read: Callable[[int, int], NDArray[np.integer]]
    ends_of: Callable[[], NDArray[np.int64]]

    @classmethod
    def of(cls, tokens: Tokens) -> Text:
        """Raises UserError where ``tokens`` is not one or more one-dimensional arrays of integers."""
        if isinstance(tokens, TokenDataset):
            dataset = tokens
            return cls(
                dataset.num_tokens, dataset.tokens, lambda: dataset.document_ends(0, dataset.num_tokens) + np.int64(1)
            )
        documents = [tokens] if isinstance(tokens, np.ndarray) else list(tokens)
        for document in documents:
            if document.ndim != 1 or not np.issubdtype(document.dtype, np.integer):
                raise UserError(
                    f"tokens is {document.dtype} of shape {list(document.shape)}: give integer token ids of one "
                    "document [tokens], or a list of such arrays."
                )
        if not documents:
            raise UserError("tokens is an empty list: give at least one document.")
        stream = documents[0] if len(documents) == 1 else np.concatenate(documents)
        ends = np.cumsum([document.size for document in documents], dtype=np.int64)
        return cls(stream.size, lambda start, stop: stream[start:stop], lambda: ends)

    @cached_property
    def documents(self) -> NDArray[np.int64]:
        """Where each document starts and ends in the stream, int64 [documents, 2]."""
        ends = self.ends_of()
        return np.stack((np.concatenate(([0], ends[:-1])), ends), axis=1)

    def rows(self, starts: NDArray[np.int64], length: int, vocab_size: int) -> NDArray[np.int64]:
        """The ``length`` tokens from each start on, int64 [rows, length].

        Raises:
            UserError: one is outside ``0 .. vocab_size - 1``.
        """
        rows = np.stack([self.read(int(start), int(start) + length) for start in starts]).astype(np.int64)
        if rows.min() < 0 or rows.max() >= vocab_size:
            row, column = np.argwhere((rows < 0) | (rows >= vocab_size))[0]
            raise UserError(
                f"Token id {rows[row, column]} at token {starts[row] + column} of the text is outside the model's "
                f"vocabulary of {vocab_size}: use the tokenizer the model was trained with."
            )
        return rows

    def num_bytes(self, start: int, stop: int, tokenizer: Tokenizer) -> int:
        """Size in UTF-8 of the text of tokens ``start .. stop - 1``; special tokens have none.

        Where tokens are not bytes, a character cut at either end counts as the replacement character it decodes to: a
        few bytes a call.
        """
        sizes = tokenizer.byte_sizes()
        if sizes is not None:
            ids = np.minimum(self.read(start, stop).astype(np.int64), sizes.size)  # a model's may be padded
            return int(np.append(sizes, 0)[ids].sum())
        cuts = [*range(start, stop, _DECODED_AT_ONCE), stop]
        parts = (tokenizer.decode(self.read(a, b)) for a, b in pairwise(cuts))
        return sum(len(part.encode()) for part in parts)


@dataclass(frozen=True)
class Documents:
    """The documents of text files, as ``data prepare`` would write them: each with the separator at its end.

    Attributes:
        tokens: of each document, in the smallest type that holds them.
        names: of each document: its file, with its number there (from 1) where the file has several.
        text_bytes: size of all text in UTF-8.
        sha256: of the text and its division into documents, whatever the tokenizer.
    """

    tokens: list[NDArray[np.unsignedinteger]]
    names: list[str]
    text_bytes: int
    sha256: str

    @classmethod
    def read(
        cls,
        files: Sequence[SourceFile],
        tokenizer: Tokenizer,
        options: ReadOptions,
        progress: Callable[[float], None] | None = None,
    ) -> Documents:
        """Read and encode files; ``progress`` is told the share that is done, 0 to 1.

        Raises UserError where one cannot be read, or all hold only white space.
        """
        dtype = token_dtype(tokenizer.vocab_size)
        end = np.array([tokenizer.eos_id], dtype)
        tokens: list[NDArray[np.unsignedinteger]] = []
        names: list[str] = []
        size, digest = 0, hashlib.sha256()
        parts: list[NDArray[np.unsignedinteger]] = []  # of the document that is being put together
        whole = max(1, sum(file.size for file in files))
        for batch, position in _batches(files, options):
            encoded = tokenizer.encode_batch([text for text, _ in batch])
            for (text, name), ids in zip(batch, encoded, strict=True):
                data = text.encode()
                size += len(data)
                digest.update(data)
                parts.append(ids.astype(dtype))
                if name is not None:
                    tokens.append(np.concatenate([*parts, end]))
                    names.append(name)
                    digest.update(b"\xff")  # which no text holds
                    parts = []
            if progress is not None:
                progress(position / whole)
        if not tokens:
            raise UserError(f"No text in the input: {files[0].path} and the others hold only white space.")
        several = Counter(name.rpartition(":")[0] for name in names)
        shown = [file if several[file] == 1 else name for name in names for file in [name.rpartition(":")[0]]]
        return cls(tokens, shown, size, digest.hexdigest())


def _batches(files: Sequence[SourceFile], options: ReadOptions) -> Iterator[tuple[list[tuple[str, str | None]], int]]:
    """Pieces of documents, many at once so that they are encoded by all cores: each with its document's name, its file
    and its number there, if the document ends with it. Documents of white space are left out. And how many bytes of all
    files have been read."""
    batch: list[tuple[str, str | None]] = []
    chars = before = 0
    for file in files:
        number, begun = 1, False
        for piece in read_file(file, options):
            if not begun and piece.end and not piece.text.strip():
                continue
            batch.append((piece.text, f"{file.path}:{number}" if piece.end else None))
            number, begun = number + piece.end, not piece.end
            chars += len(piece.text)
            if chars >= _ENCODED_AT_ONCE:
                yield batch, before + piece.position
                batch, chars = [], 0
        before += file.size
    if batch:
        yield batch, before
