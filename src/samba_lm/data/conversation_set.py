"""Conversations as token ids with the answers marked, in memory or in a folder that is mapped into it.

A prepared folder::

    meta.json      format, version, counts, the tokenizer's fingerprint, the chat template, size and sha256 of each file
    tokenizer.json (and tokenizer_config.json, which holds the chat template)
    tokens.bin     uint16 or uint32 (as of shards), [tokens], little-endian: the conversations one after the other
    answers.bin    uint8 [tokens]: 1 where an answer is to be learnt
    offsets.bin    int64 [conversations + 1]: where each begins, then the end

What is packed into a row depends on how many tokens each conversation has, so all must be tokenized before the first
step. A few megabytes are, at the start of a run. More is prepared once, by several processes: every start, on every
rank, then maps three files, and reads no more of them than its rows need.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import ExitStack, closing
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO

import numpy as np
from pydantic import BaseModel, ConfigDict, NonNegativeInt, PositiveInt, ValidationError

from samba_lm.data.conversations import Conversation, read_conversations
from samba_lm.data.encode import encode_in_order
from samba_lm.data.folder import file_sha256
from samba_lm.data.output import check_numbers, check_out, split_of
from samba_lm.data.shards import token_dtype
from samba_lm.data.sources import SourceFile, find_files
from samba_lm.errors import UserError
from samba_lm.files import atomic_folder, read_json, recover_folder
from samba_lm.templates import TAUGHT, FolderTemplate, Segment
from samba_lm.tokenizer import CONFIG_FILE, TOKENIZER_FILE, ByteTokenizer, Tokenizer, load_tokenizer

if TYPE_CHECKING:
    from numpy.typing import NDArray

FORMAT, VERSION, META_FILE = "samba-lm conversations", 1, "meta.json"
TOKENS, ANSWERS, OFFSETS = "tokens.bin", "answers.bin", "offsets.bin"
_OUR_FILES = re.compile("|".join(map(re.escape, (META_FILE, TOKENIZER_FILE, CONFIG_FILE, TOKENS, ANSWERS, OFFSETS))))
_AGAIN = "make it again with `samba-lm data chat`, or copy it again"
IN_MEMORY_BYTES = 2**26
"""Files larger than this together are to be prepared: they would be tokenized by one process at every start."""

OnProgress = Callable[[str, int, int], None]
"""Called with what is being done, and the bytes of the input files done and in all."""


class FileMeta(BaseModel):
    """One of the three array files."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    bytes: PositiveInt
    sha256: str


class Meta(BaseModel):
    """The content of ``meta.json``."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    format: str = FORMAT
    version: int = VERSION
    tokenizer: str
    """The tokenizer's fingerprint."""
    chat_template: str
    conversations: PositiveInt
    tokens: PositiveInt
    answer_tokens: NonNegativeInt
    longest: PositiveInt
    """Tokens of the longest conversation."""
    files: dict[str, FileMeta]


@dataclass(frozen=True)
class ConversationSet:
    """Conversations, one after the other.

    Attributes:
        name: for people.
        tokenizer: that of the tokens; its ``chat_template`` wrote the conversations out.
        tokens: uint16 or uint32 [tokens].
        answers: uint8 [tokens], 1 where the token is to be learnt.
        offsets: int64 [conversations + 1].
        sha256: of all that.
    """

    name: str
    tokenizer: Tokenizer
    tokens: NDArray[np.unsignedinteger]
    answers: NDArray[np.uint8]
    offsets: NDArray[np.int64]
    sha256: str

    def __len__(self) -> int:
        return self.offsets.size - 1

    def lengths(self) -> NDArray[np.int64]:
        """Tokens of each conversation, int64."""
        return np.diff(self.offsets)

    def read(self, index: int, most: int) -> tuple[NDArray[np.int64], NDArray[np.bool_]]:
        """The first ``most`` tokens of a conversation, int64, and which of them are to be learnt."""
        start = int(self.offsets[index])
        stop = min(int(self.offsets[index + 1]), start + most)
        ids = self.tokens[start:stop].astype(np.int64)
        if ids.size and ids.max() >= self.tokenizer.vocab_size:
            raise UserError(f"{self.name} is damaged (a token id is {ids.max()}): {_AGAIN}.")
        return ids, self.answers[start:stop] == 1

    @classmethod
    def of_files(cls, inputs: Sequence[str], tokenizer: Tokenizer) -> ConversationSet:
        """Tokenize files into memory. Raises UserError for what is no conversation, and for files too large for it."""
        files = find_files(inputs)
        size = sum(file.size for file in files)
        if size > IN_MEMORY_BYTES:
            raise UserError(
                f"{', '.join(inputs)} is {size / 1e6:,.0f} MB, which would be tokenized at every start: prepare it "
                "once (samba-lm data chat FILE --model CKPT --out FOLDER), and give the folder."
            )
        tokens, answers, lengths = [], [], []
        with closing(encode_conversations(files, tokenizer, processes=1)) as encoded:
            for each in encoded:
                tokens.append(each.ids.astype(token_dtype(tokenizer.vocab_size)))
                answers.append(each.answers.astype(np.uint8))
                lengths.append(each.ids.size)
        arrays = np.concatenate(tokens), np.concatenate(answers), np.cumsum([0, *lengths])
        known = hashlib.sha256(f"{tokenizer.fingerprint()} {tokenizer.chat_template}".encode())
        for array in arrays:
            known.update(array.tobytes())
        return cls(", ".join(inputs), tokenizer, *arrays, known.hexdigest())

    @classmethod
    def open(cls, folder: str | os.PathLike[str]) -> ConversationSet:
        """Map a folder that `samba-lm data chat` made. Raises UserError for one that is missing, foreign or damaged."""
        folder = Path(folder)
        meta = read_meta(folder)
        tokenizer = load_tokenizer(folder)
        if (tokenizer.fingerprint(), tokenizer.chat_template) != (meta.tokenizer, meta.chat_template):
            raise UserError(f"{folder} has another tokenizer or chat template than wrote its tokens: {_AGAIN}.")
        shapes = (
            (TOKENS, token_dtype(tokenizer.vocab_size), meta.tokens),
            (ANSWERS, np.dtype(np.uint8), meta.tokens),
            (OFFSETS, np.dtype("<i8"), meta.conversations + 1),
        )
        arrays = []
        for name, dtype, size in shapes:
            path = folder / name
            if not path.is_file():
                raise UserError(f"{path} is missing: {_AGAIN}.")
            if not path.stat().st_size == size * dtype.itemsize == meta.files[name].bytes:
                raise UserError(f"{path} has {path.stat().st_size} bytes, not those of {META_FILE}: {_AGAIN}.")
            arrays.append(np.memmap(path, dtype, mode="r", shape=(size,)))
        offsets = np.asarray(arrays[2])
        if offsets[0] != 0 or offsets[-1] != meta.tokens or (np.diff(offsets) < 1).any():
            raise UserError(f"{folder / OFFSETS} is damaged: {_AGAIN}.")
        sha256 = hashlib.sha256(meta.model_dump_json().encode()).hexdigest()
        return cls(str(folder), tokenizer, arrays[0], arrays[1], offsets, sha256)


def is_conversation_set(folder: str | os.PathLike[str]) -> bool:
    """Whether a path is a folder of this format, whole or not."""
    file = Path(folder) / META_FILE
    return file.is_file() and f'"{FORMAT}"' in file.read_text(encoding="utf-8", errors="replace")


def read_meta(folder: Path) -> Meta:
    """Read and check ``meta.json``. Raises UserError."""
    recover_folder(folder)
    if not (folder / META_FILE).is_file():
        raise UserError(f"{folder} holds no prepared conversations: make them with `samba-lm data chat`.")
    try:
        meta = Meta.model_validate(read_json(folder / META_FILE))
    except ValidationError:
        meta = None
    if (
        meta is None
        or (meta.format, meta.version) != (FORMAT, VERSION)
        or meta.files.keys() != {TOKENS, ANSWERS, OFFSETS}
    ):
        raise UserError(f"{folder} holds no conversations of this version: make them with `samba-lm data chat`.")
    return meta


@dataclass(frozen=True)
class Encoded:
    """A conversation's ids, int64 [n], which of them are answers, bool [n], and where it stood."""

    conversation: Conversation
    ids: NDArray[np.int64]
    answers: NDArray[np.bool_]
    done: int
    """Bytes of all files that have been read."""


def teaching_template(tokenizer: Tokenizer) -> FolderTemplate:
    """The template that conversations are learnt by: the tokenizer's, or :data:`TAUGHT`, which it then has.

    Raises UserError for one that no model can learn from.
    """
    if tokenizer.chat_template is None:
        tokenizer.chat_template = TAUGHT
    template = FolderTemplate(tokenizer.chat_template, tokenizer)
    template.check_teachable()
    return template


def lesson(template: FolderTemplate, conversation: Conversation) -> list[Segment]:
    """A conversation's segments up to the end of its last answer: nothing is learnt from what comes after.

    Raises UserError, saying where it stands, for one that the template refuses.
    """
    try:
        segments = template.segments(conversation.messages, invite=False)
    except UserError as error:
        raise UserError(f"{conversation.where}: {error}") from None
    return segments[: 1 + max(i for i, segment in enumerate(segments) if segment.answer)]


def encode_conversations(
    files: Sequence[SourceFile], tokenizer: Tokenizer, processes: int
) -> Generator[Encoded, None, None]:
    """Yield the conversations of the files, in order, as ids. Close it to end its processes.

    Raises UserError for what is no conversation.
    """
    template = teaching_template(tokenizer)
    if isinstance(tokenizer, ByteTokenizer):
        processes = 1  # bytes need no encoding
    Label = tuple[Segment, Conversation | None, int]

    def texts() -> Iterator[tuple[str, Label]]:
        base = 0
        for file in files:
            for conversation in read_conversations(file):
                *others, last = lesson(template, conversation)
                for segment in others:
                    yield ("" if segment.special is not None else segment.text), (segment, None, 0)
                done = base + conversation.position
                yield ("" if last.special is not None else last.text), (last, conversation, done)
            base += file.size

    ids: list[NDArray[np.int64]] = []
    answers: list[NDArray[np.bool_]] = []
    with closing(encode_in_order(texts(), tokenizer, processes)) as encoded:
        for (segment, conversation, done), found in encoded:
            part = found if segment.special is None else np.array([segment.special])
            ids.append(part.astype(np.int64))
            answers.append(np.full(part.size, segment.answer))
            if conversation is not None:
                yield Encoded(conversation, np.concatenate(ids), np.concatenate(answers), done)
                ids, answers = [], []


class Writer:
    """Writes a set into an existing empty folder, conversation by conversation."""

    def __init__(self, folder: Path, tokenizer: Tokenizer) -> None:
        self._folder, self._tokenizer = folder, tokenizer
        self._dtype = token_dtype(tokenizer.vocab_size)
        self._stack = ExitStack()
        self._files: dict[str, BinaryIO] = {}
        self.conversations = self.tokens = self.answer_tokens = self.longest = 0

    def __enter__(self) -> Writer:
        self._files = {
            name: self._stack.enter_context((self._folder / name).open("wb")) for name in (TOKENS, ANSWERS, OFFSETS)
        }
        self._files[OFFSETS].write(np.zeros(1, dtype="<i8").tobytes())
        return self

    def __exit__(self, *error: object) -> None:
        self._stack.close()

    def append(self, ids: NDArray[np.int64], answers: NDArray[np.bool_]) -> None:
        """Append a conversation: ids [n], answers [n]."""
        self.conversations += 1
        self.tokens += ids.size
        self.answer_tokens += int(answers.sum())
        self.longest = max(self.longest, ids.size)
        self._files[TOKENS].write(ids.astype(self._dtype).tobytes())
        self._files[ANSWERS].write(answers.astype(np.uint8).tobytes())
        self._files[OFFSETS].write(np.array([self.tokens], dtype="<i8").tobytes())

    def close(self) -> Meta:
        """Write the tokenizer and ``meta.json``."""
        self._stack.close()
        self._tokenizer.save(self._folder)
        assert self._tokenizer.chat_template is not None
        paths = {name: self._folder / name for name in (TOKENS, ANSWERS, OFFSETS)}
        meta = Meta(
            tokenizer=self._tokenizer.fingerprint(),
            chat_template=self._tokenizer.chat_template,
            conversations=self.conversations,
            tokens=self.tokens,
            answer_tokens=self.answer_tokens,
            longest=self.longest,
            files={n: FileMeta(bytes=path.stat().st_size, sha256=file_sha256(path)) for n, path in paths.items()},
        )
        (self._folder / META_FILE).write_text(meta.model_dump_json(indent=2) + "\n", encoding="utf-8")
        return meta


def prepare_conversations(
    inputs: Sequence[str | os.PathLike[str]],
    out: str | os.PathLike[str],
    tokenizer: Tokenizer,
    *,
    processes: int = 1,
    val_fraction: float = 0.0,
    overwrite: bool = False,
    progress: OnProgress | None = None,
) -> dict[str, Meta]:
    """Turn JSON lines into a set at ``out``, or into ``out/train`` and ``out/val``; nothing is left on any error.

    ``val_fraction`` of the conversations, chosen by a hash of their words, are set aside. Returns what was made by name
    ("" for ``out`` itself). Raises UserError for bad input, and where ``out`` may not be written.
    """
    check_numbers(val_fraction, processes)
    out = Path(out)
    files = find_files(inputs)
    paths = [file.path for file in files]
    check_out(out, paths, overwrite, what="prepared conversations", is_ours=_is_ours, names=_OUR_FILES)
    total = sum(file.size for file in files)
    with atomic_folder(out) as folder, ExitStack() as stack:
        writers = {}
        for name in ("train", "val") if val_fraction else ("",):
            (folder / name).mkdir(exist_ok=True)
            writers[name] = stack.enter_context(Writer(folder / name, tokenizer))
        for each in stack.enter_context(closing(encode_conversations(files, tokenizer, processes))):
            split = split_of(json.dumps(each.conversation.messages), val_fraction)
            writers[split].append(each.ids, each.answers)
            if progress:
                progress("encoding", each.done, total)
        for name, writer in writers.items():
            if not writer.conversations:
                among = sum(each.conversations for each in writers.values())
                raise UserError(
                    f"No conversation of {among} fell to the {name} set: give more, or another --val-fraction."
                    if among
                    else f"There is no conversation in {', '.join(str(file.path) for file in files)}."
                )
        return {name: writer.close() for name, writer in writers.items()}


def _is_ours(folder: Path) -> bool:
    return any(is_conversation_set(each) for each in (folder, folder / "train", folder / "val"))
