"""Text to token ids and back: raw bytes, BPE trained on the spot, or any ``tokenizer.json``.

Every tokenizer has one document separator, ``eos_id``. Text can never produce it: the literal ``<|endoftext|>`` inside
a document is encoded as ordinary characters, so a document cannot end itself or forge a boundary.
"""

from __future__ import annotations

import abc
import codecs
import functools
import hashlib
import json
import os
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import chain, islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from samba_lm.errors import UserError, did_you_mean, one_line
from samba_lm.files import write_text

if TYPE_CHECKING:
    from numpy.typing import NDArray

    Ids = NDArray[np.int64]

TOKENIZER_FILE = "tokenizer.json"
CONFIG_FILE = "tokenizer_config.json"  # the Hugging Face name; we write and read its "eos_token" and "chat_template"
TEMPLATE_FILE = "chat_template.jinja"
EOS = "<|endoftext|>"
USUAL_EOS = (EOS, "<|end_of_text|>", "</s>", "<eos>", "<|eos|>", "<|im_end|>", "[EOS]")
_PANIC = "PanicException"  # of Rust code; the library exports no name for it
_PART_CHARS = 2**13
_BREAK = re.compile(r"(?<=\w)[ \n]")
MIN_BPE_VOCAB = 257  # 256 bytes and the separator
MAX_BPE_VOCAB = 1_000_000


class StreamDecoder(abc.ABC):
    """Turns ids into text one at a time, without ever showing half a character."""

    @abc.abstractmethod
    def feed(self, token_id: int) -> str:
        """Return the text that ``token_id`` completes; "" while a character is incomplete."""

    @abc.abstractmethod
    def flush(self) -> str:
        """Return what is still held back, an incomplete character as U+FFFD, and start afresh."""


class Tokenizer(abc.ABC):
    """What the rest of the package knows of a tokenizer.

    Attributes:
        vocab_size: one more than the largest id (not the number of entries: files may have holes).
        eos_id: the document separator.
        eos_token: its name in ``tokenizer.json``.
        chat_template: how conversations are written out for its model, in Jinja (:mod:`samba_lm.templates`); None where
            nothing says so. It changes no ids of a text and is no part of the fingerprint.
    """

    vocab_size: int
    eos_id: int
    eos_token: str
    chat_template: str | None = None

    def encode(self, text: str) -> Ids:
        """Return the ids of ``text``, int64 ``[tokens]``, without any special token.

        Raises:
            UserError: ``text`` holds a lone surrogate, which no UTF-8 text can.
        """
        return self.encode_batch([text])[0]

    @abc.abstractmethod
    def encode_batch(self, texts: Sequence[str]) -> list[Ids]:
        """:meth:`encode` for many texts at once."""

    @abc.abstractmethod
    def decode(self, ids: Iterable[int] | Ids) -> str:
        """Return the text of ``ids``; bytes that are not UTF-8 become U+FFFD.

        Special tokens, and ids outside the vocabulary (a model's may be padded), have no text.
        """

    def byte_sizes(self) -> Ids | None:
        """Return how many bytes of UTF-8 each id stands for, int64 ``[vocab_size]``, 0 for special tokens; None where
        that depends on the ids beside it."""
        return None

    @abc.abstractmethod
    def stream_decoder(self) -> StreamDecoder:
        """Return a fresh :class:`StreamDecoder`."""

    @abc.abstractmethod
    def to_json(self) -> str:
        """Return the content of ``tokenizer.json``."""

    def fingerprint(self) -> str:
        """Return the sha256 (hex) of the canonical ``tokenizer.json`` and the separator's name.

        Two files that differ only in layout have one fingerprint.
        """
        content = json.dumps([json.loads(self.to_json()), self.eos_token], sort_keys=True, separators=(",", ":"))
        return hashlib.sha256(content.encode()).hexdigest()

    def save(self, folder: str | os.PathLike[str]) -> None:
        """Write ``tokenizer.json`` and ``tokenizer_config.json`` (the separator's name, the chat template) into
        ``folder``, atomically."""
        write_text(Path(folder) / TOKENIZER_FILE, self.to_json())
        write_text(Path(folder) / CONFIG_FILE, json.dumps(self.describe(), indent=2) + "\n")

    def describe(self) -> dict[str, str]:
        """What ``tokenizer_config.json`` says beside ``tokenizer.json``."""
        template = {} if self.chat_template is None else {"chat_template": self.chat_template}
        return {"eos_token": self.eos_token, **template}


class ByteTokenizer(Tokenizer):
    """Ids 0..255 are the bytes of UTF-8; 256 separates documents."""

    vocab_size = 257
    eos_id = 256
    eos_token = EOS

    def encode_batch(self, texts: Sequence[str]) -> list[Ids]:
        return [np.frombuffer(_utf8(text), dtype=np.uint8).astype(np.int64) for text in texts]

    def decode(self, ids: Iterable[int] | Ids) -> str:
        array = _as_ids(ids)
        return array[(array >= 0) & (array < 256)].astype(np.uint8).tobytes().decode("utf-8", errors="replace")

    def byte_sizes(self) -> Ids:
        return np.array([1] * 256 + [0], dtype=np.int64)

    def stream_decoder(self) -> StreamDecoder:
        return _BytesStream([bytes([b]) for b in range(256)])

    def to_json(self) -> str:
        """Byte-level BPE without merges: any tool that reads ``tokenizer.json`` gives the same ids."""
        return json.dumps(_BYTE_TOKENIZER_JSON, ensure_ascii=False, indent=2) + "\n"


class FileTokenizer(Tokenizer):
    """Any ``tokenizer.json``, run by the ``tokenizers`` library.

    Args:
        content: the text of ``tokenizer.json``.
        eos: the name of the document separator; by default the first of :data:`USUAL_EOS` the file has.
        source: what to call the file in errors.

    Raises:
        UserError: ``content`` is no tokenizer, or has no such separator.
    """

    def __init__(self, content: str, eos: str | None = None, source: str = TOKENIZER_FILE) -> None:
        import tokenizers

        try:
            runner = tokenizers.Tokenizer.from_str(content)
        except BaseException as error:  # the library raises the bare Exception, and panics, which are not even that
            if type(error) is not Exception and type(error).__name__ != _PANIC:
                raise
            raise UserError(f"{source} is not a tokenizer.json: {one_line(str(error))}.") from error
        self._content = content
        self._source = source
        vocabulary: dict[str, int] = runner.get_vocab(with_added_tokens=True)
        self.vocab_size = max(vocabulary.values(), default=-1) + 1
        self.eos_token = _find_eos(vocabulary, eos, source)
        self.eos_id = vocabulary[self.eos_token]
        # Truncation and padding saved in the file would cut documents; special tokens spelled out in text stay text.
        runner.no_truncation()
        runner.no_padding()
        runner.add_special_tokens([self.eos_token])
        runner.encode_special_tokens = True
        self._runner = runner
        self._cut = _cuts_unseen(json.loads(content))

    def encode_batch(self, texts: Sequence[str]) -> list[Ids]:
        for text in texts:
            _utf8(text)
        parts = [_parts(text) if self._cut else [text] for text in texts]
        try:
            encodings = iter(self._runner.encode_batch_fast([*chain(*parts)], add_special_tokens=False))
        except Exception as error:
            if type(error) is not Exception:  # the library raises the bare class for text it has no token for
                raise
            raise UserError(
                f"{self._source} cannot encode this text ({one_line(str(error))}): use a tokenizer that knows every "
                "character, or one with a token for unknown ones."
            ) from error
        joined = ([*chain.from_iterable(one.ids for one in islice(encodings, len(own)))] for own in parts)
        return [self._checked(np.array(ids, dtype=np.int64)) for ids in joined]

    def decode(self, ids: Iterable[int] | Ids) -> str:
        array = _as_ids(ids)
        array = array[(array >= 0) & (array < self.vocab_size)]
        text: str = self._runner.decode(array.tolist(), skip_special_tokens=True)
        return text

    def byte_sizes(self) -> Ids | None:
        return self._byte_sizes if self._bytes_of else None

    def stream_decoder(self) -> StreamDecoder:
        return _BytesStream(self._bytes_of) if self._bytes_of else _TextStream(self)

    def to_json(self) -> str:
        return self._content

    def _checked(self, ids: Ids) -> Ids:
        # Word-level models look whole words up in the vocabulary, the separator's name among them.
        if (ids == self.eos_id).any():
            raise UserError(
                f"{self._source} encodes the text {self.eos_token!r} as its document separator (id {self.eos_id}), "
                "so a document could forge a boundary: use another tokenizer, or another token as `eos`."
            )
        return ids

    @functools.cached_property
    def _bytes_of(self) -> list[bytes]:
        """The bytes of each id for byte-level models; empty for the others."""
        if (json.loads(self._content).get("decoder") or {}).get("type") != "ByteLevel":
            return []
        special = {i for i, token in self._runner.get_added_tokens_decoder().items() if token.special}
        table = [b""] * self.vocab_size
        for token, i in self._runner.get_vocab(with_added_tokens=True).items():
            if i not in special:
                known = all(char in _BYTE_OF for char in token)
                table[i] = bytes(_BYTE_OF[char] for char in token) if known else token.encode()
        return table

    @functools.cached_property
    def _byte_sizes(self) -> Ids:
        return np.array([len(bytes_) for bytes_ in self._bytes_of], dtype=np.int64)


@dataclass(frozen=True)
class BpeSpec:
    """A request to train a byte-level BPE of ``vocab_size`` entries on the text at hand."""

    vocab_size: int


def train_bpe(texts: Iterable[str], vocab_size: int) -> FileTokenizer:
    """Train a byte-level BPE on ``texts``, read once; the same texts in the same order give the same tokenizer.

    Digits stand alone, as in Llama's tokenizer: a number has one reading, whatever numbers the texts were full of.
    The result has fewer than ``vocab_size`` entries when the text has too few repeated pairs.

    Raises:
        UserError: ``vocab_size`` is outside 257 (the bytes and the separator) .. 1,000,000.
    """
    import tokenizers
    from tokenizers import decoders, models, pre_tokenizers, trainers

    _check_bpe_vocab(vocab_size)
    runner = tokenizers.Tokenizer(models.BPE())
    digits = pre_tokenizers.Digits(individual_digits=True)
    words = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    runner.pre_tokenizer = pre_tokenizers.Sequence([digits, words])
    runner.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        min_frequency=2,
        special_tokens=[EOS],
        initial_alphabet=sorted(_BYTE_OF),
        show_progress=False,
    )
    runner.train_from_iterator(iter(texts), trainer=trainer)
    return FileTokenizer(runner.to_str(pretty=True), eos=EOS, source="the BPE trained here")


def tokenizer_from_json(content: str, eos: str | None = None, source: str = TOKENIZER_FILE) -> Tokenizer:
    """Return the tokenizer that the text of a ``tokenizer.json`` describes.

    Raises:
        UserError: see :class:`FileTokenizer`.
    """
    try:
        document = json.loads(content)
    except json.JSONDecodeError as error:
        raise UserError(f"{source} is not a tokenizer.json: not valid JSON ({error}).") from error
    except (ValueError, RecursionError) as error:  # a number too long; brackets without end
        raise UserError(f"{source} is not a tokenizer.json: nested too deeply, or a number too long.") from error
    if eos in (None, EOS) and _is_byte_tokenizer(document):
        return ByteTokenizer()
    return FileTokenizer(content, eos=eos, source=source)


def load_tokenizer(path: str | os.PathLike[str], eos: str | None = None) -> Tokenizer:
    """Load a ``tokenizer.json``, or the one in a folder (a checkpoint, a data set, a downloaded model).

    The separator is ``eos``, or the "eos_token" of a ``tokenizer_config.json`` beside the file, or the usual name; a
    ``chat_template.jinja`` beside it, or else the "chat_template" of that config, is the chat template.

    Raises:
        UserError: missing, unreadable or foreign file; no separator.
    """
    path = Path(path)
    file = path / TOKENIZER_FILE if path.is_dir() else path
    content = _read_text(file)
    if eos is None:
        eos = _configured_eos(file.with_name(CONFIG_FILE))
    tokenizer = tokenizer_from_json(content, eos=eos, source=str(file))
    tokenizer.chat_template = _chat_template(file.parent)
    return tokenizer


def parse_tokenizer(spec: str, eos: str | None = None) -> Tokenizer | BpeSpec:
    """Read what a person wrote: ``byte``, ``bpe:8192`` or the path of a ``tokenizer.json`` or of its folder.

    Raises:
        UserError: ``spec`` is none of these, or the file is no tokenizer.
    """
    if not spec:
        raise UserError("The tokenizer is an empty name: write byte, bpe:SIZE, or the path of a tokenizer.json.")
    if spec == "byte":
        return ByteTokenizer()
    name, colon, size = spec.partition(":")
    if name == "bpe" and (colon or not Path(spec).exists()):
        if not (size.isascii() and size.isdecimal()):
            raise UserError(f"Tokenizer {spec!r} must name a vocabulary size: write bpe:8192, for example.")
        _check_bpe_vocab(int(size))
        return BpeSpec(int(size))
    if not Path(spec).exists():
        hint = did_you_mean(spec, ["byte", "bpe:8192"])
        raise UserError(f"Tokenizer {spec!r} is neither byte, bpe:SIZE, nor a file or folder that exists.{hint}")
    return load_tokenizer(spec, eos=eos)


class _BytesStream(StreamDecoder):
    """For tokenizers whose ids are byte strings: exact, and holds back at most three bytes."""

    def __init__(self, bytes_of: list[bytes]) -> None:
        self._bytes_of = bytes_of
        self._decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")

    def feed(self, token_id: int) -> str:
        if not 0 <= token_id < len(self._bytes_of):
            return ""
        return self._decoder.decode(self._bytes_of[token_id])

    def flush(self) -> str:
        text = self._decoder.decode(b"", final=True)
        self._decoder.reset()
        return text


class _TextStream(StreamDecoder):
    """For any other tokenizer: decode a short tail with and without the new ids, and show the difference.

    The tail matters because such decoders treat the first token apart (they drop the space of its word).
    """

    # A character has at most four bytes, so four byte tokens; an ending still incomplete after more is not text.
    _MAX_HELD = 8

    def __init__(self, tokenizer: FileTokenizer) -> None:
        self._tokenizer = tokenizer
        self._tail: list[int] = []  # shown, kept as context
        self._held: list[int] = []  # not shown yet

    def feed(self, token_id: int) -> str:
        if token_id == self._tokenizer.eos_id:
            return ""
        self._held.append(token_id)
        text = self._held_text()
        if not text or (text.endswith("\N{REPLACEMENT CHARACTER}") and len(self._held) < self._MAX_HELD):
            # Ids without text (special tokens) must not pile up.
            self._held = self._held[-self._MAX_HELD :]
            return ""
        self._tail, self._held = self._held, []
        return text

    def flush(self) -> str:
        text = self._held_text()
        self._tail, self._held = [], []
        return text

    def _held_text(self) -> str:
        return self._tokenizer.decode(self._tail + self._held)[len(self._tokenizer.decode(self._tail)) :]


def _utf8(text: str) -> bytes:
    try:
        return text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise UserError(
            f"Text is not valid Unicode: character {error.start} is the lone surrogate "
            f"U+{ord(text[error.start]):04X}; remove it or replace it by U+FFFD."
        ) from error


def _parts(text: str) -> list[str]:
    """``text`` in parts of some thousand characters, which the library encodes faster than a long text, and on several
    cores; cut where a word ends and a space follows."""
    parts, start = [], 0
    while (found := _BREAK.search(text, start + _PART_CHARS)) is not None:
        parts.append(text[start : found.start()])
        start = found.start()
    return [*parts, text[start:]]


def _cuts_unseen(document: Any) -> bool:
    """Whether a ``tokenizer.json`` surely gives a text and its :func:`_parts` the same ids: it splits as GPT-2's does,
    whose words hold white space at most before their other characters, and does nothing to a text before."""
    splitter = document.get("pre_tokenizer") or {}
    *others, last = splitter.get("pretokenizers") or [splitter]
    return (
        document.get("normalizer") is None
        and all(token.get("special") for token in document.get("added_tokens") or ())
        and all(one.get("type") == "Digits" for one in others)
        and (last.get("type"), last.get("add_prefix_space")) == ("ByteLevel", False)
        and last.get("use_regex", True) is True
    )


def _as_ids(ids: Iterable[int] | Ids) -> Ids:
    if isinstance(ids, (np.ndarray, Sequence)):
        return np.asarray(ids, dtype=np.int64).reshape(-1)
    return np.fromiter((int(i) for i in ids), dtype=np.int64)


def _find_eos(vocabulary: dict[str, int], eos: str | None, source: str) -> str:
    if eos is not None:
        if eos in vocabulary:
            return eos
        raise UserError(f"{source} has no token {eos!r} to separate documents.{did_you_mean(eos, vocabulary)}")
    for name in USUAL_EOS:
        if name in vocabulary:
            return name
    raise UserError(
        f"{source} has none of the usual separators ({', '.join(USUAL_EOS)}): name its end-of-text token with "
        '`eos` (`--eos "<token>"` on the command line).'
    )


def _configured(file: Path, key: str) -> Any:
    """What a ``tokenizer_config.json`` says under ``key``; None where it is missing."""
    if not file.is_file():
        return None
    try:
        return json.loads(_read_text(file)).get(key)
    except (ValueError, RecursionError, AttributeError) as error:
        if isinstance(error, UserError):
            raise
        raise UserError(f"{file} is not a tokenizer_config.json ({error}): mend or remove it.") from error


def _chat_template(folder: Path) -> str | None:
    """The chat template of a folder, as it stands there."""
    if (folder / TEMPLATE_FILE).is_file():
        return _read_text(folder / TEMPLATE_FILE)
    template = _configured(folder / CONFIG_FILE, "chat_template")
    return template if isinstance(template, str) else None


def _configured_eos(file: Path) -> str | None:
    """Return the "eos_token" of a ``tokenizer_config.json``: a name, or a token's description with its name."""
    eos = _configured(file, "eos_token")
    name = eos.get("content") if isinstance(eos, dict) else eos
    if not isinstance(name, str | None):
        raise UserError(f"{file}: eos_token is {json.dumps(eos)[:40]}, not a token's name: mend or remove it.")
    return name


def _read_text(file: Path) -> str:
    try:
        return file.read_text(encoding="utf-8")
    except OSError as error:
        raise UserError(f"Cannot read the tokenizer {file}: {error.strerror or error}.") from error
    except UnicodeDecodeError as error:
        raise UserError(f"{file} is not a tokenizer file: byte {error.start} is not UTF-8.") from error


def _check_bpe_vocab(vocab_size: int) -> None:
    if not MIN_BPE_VOCAB <= vocab_size <= MAX_BPE_VOCAB:
        raise UserError(
            f"BPE vocabulary size {vocab_size} is outside {MIN_BPE_VOCAB}..{MAX_BPE_VOCAB} "
            "(the 256 bytes and the separator are always in it): choose for example bpe:8192."
        )


def _byte_alphabet() -> list[str]:
    """The printable stand-in of each byte in byte-level ``tokenizer.json`` files: itself, or the next from U+0100."""
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    spare = iter(range(0x100, 0x200))
    return [chr(b) if b in printable else chr(next(spare)) for b in range(256)]


_BYTE_OF = {char: b for b, char in enumerate(_byte_alphabet())}

# Spelled out rather than asked of the library, so that the fingerprint does not change with its version.
_BYTE_LEVEL = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}
_BYTE_TOKENIZER_JSON: dict[str, Any] = {
    "version": "1.0",
    "truncation": None,
    "padding": None,
    "added_tokens": [
        {
            "id": 256,
            "content": EOS,
            "single_word": False,
            "lstrip": False,
            "rstrip": False,
            "normalized": False,
            "special": True,
        }
    ],
    "normalizer": None,
    "pre_tokenizer": _BYTE_LEVEL,
    "post_processor": None,
    "decoder": _BYTE_LEVEL,
    "model": {
        "type": "BPE",
        "dropout": None,
        "unk_token": None,
        "continuing_subword_prefix": None,
        "end_of_word_suffix": None,
        "fuse_unk": False,
        "byte_fallback": False,
        "ignore_merges": False,
        "vocab": {**_BYTE_OF, EOS: 256},
        "merges": [],
    },
}


def _is_byte_tokenizer(document: Any) -> bool:
    """Whether a ``tokenizer.json`` is ours for bytes, written by us or written again by another tool."""
    if not isinstance(document, dict) or not isinstance(document.get("model"), dict):
        return False
    ours, model, splitter = _BYTE_TOKENIZER_JSON, document["model"], document.get("pre_tokenizer")
    return (
        model.get("vocab") == ours["model"]["vocab"]
        and model.get("merges") == []
        and document.get("normalizer") is None
        and document.get("added_tokens") == ours["added_tokens"]
        and isinstance(splitter, dict)
        and (splitter.get("type"), splitter.get("add_prefix_space")) == ("ByteLevel", False)
    )
