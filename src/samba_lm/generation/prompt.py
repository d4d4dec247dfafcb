"""Prompts as token chunks: a text, token ids, or a file of any length read in pieces."""

from __future__ import annotations

import codecs
import re
from collections.abc import Iterable, Iterator
from typing import BinaryIO

import numpy as np
import numpy.typing as npt

from samba_lm.errors import UserError
from samba_lm.tokenizer import Tokenizer

TokenIds = npt.NDArray[np.integer]
Prompt = str | TokenIds | Iterable[TokenIds]
"""A text, token ids [L], or an iterator of token-id chunks for what should not be in memory whole."""

PIECE_BYTES = 1 << 16
# How much text on either side of a cut is encoded, together and apart, to see that the cut changes nothing.
CUT_CONTEXT = 200
# Where a tokenizer is likeliest to start a new token, best first: after a line, before a word, anywhere.
CUTS = (re.compile(r"(?<=\S\n)(?=\S)"), re.compile(r"(?<=\S)(?=[ \n]\S)"), re.compile(r"(?<=.)(?=.)", re.DOTALL))


def prompt_chunks(prompt: Prompt, tokenizer: Tokenizer, begins: bool = True) -> Iterator[TokenIds]:
    """Yield the token ids of a prompt, in one chunk or several.

    Where a text ``begins`` with it, an empty prompt becomes the end-of-text token, which is what a document starts
    after in training. Raises UserError when the prompt is none of the kinds of :data:`Prompt`.
    """
    empty = True
    for chunk in _chunks(prompt, tokenizer):
        if chunk.ndim != 1 or not (np.issubdtype(chunk.dtype, np.integer) or chunk.size == 0):
            raise UserError(
                f"A prompt of {chunk.dtype}{list(chunk.shape)} is not a sequence of token ids: give integers [L]."
            )
        if chunk.size:
            empty = False
            yield chunk
    if empty and begins:
        if tokenizer.eos_id is None:
            raise UserError(
                "The prompt is empty and the tokenizer has no end-of-text token to start from: give a text."
            )
        yield np.array([tokenizer.eos_id], dtype=np.int64)


def _chunks(prompt: Prompt, tokenizer: Tokenizer) -> Iterator[TokenIds]:
    if isinstance(prompt, str):
        yield tokenizer.encode(prompt)
    elif isinstance(prompt, np.ndarray):
        yield prompt
    elif not isinstance(prompt, Iterable):
        raise UserError(
            f"A prompt may not be a {type(prompt).__name__} ({prompt!r}): give a text or a numpy array of token ids (a "
            "list is several prompts)."
        )
    else:
        for chunk in prompt:
            if not isinstance(chunk, np.ndarray):
                raise UserError(
                    f"A prompt may not hold {type(chunk).__name__} values: give a text, a numpy array of token ids, or "
                    "an iterator of such arrays."
                )
            yield chunk


def rechunk(chunks: Iterable[TokenIds], size: int) -> Iterator[npt.NDArray[np.int64]]:
    """Yield the same tokens in int64 chunks of exactly `size`, the last one possibly shorter."""
    parts: list[TokenIds] = []
    held = 0
    for chunk in chunks:
        start = 0
        while chunk.size - start >= size - held:
            end = start + size - held
            yield np.concatenate([*parts, chunk[start:end]], dtype=np.int64)
            parts, held, start = [], 0, end
        if start < chunk.size:
            parts.append(chunk[start:])
            held += chunk.size - start
    if held:
        yield np.concatenate(parts, dtype=np.int64)


def read_text(file: BinaryIO, name: str, piece_bytes: int = PIECE_BYTES) -> Iterator[str]:
    """Yield a UTF-8 file in pieces; UserError says which byte is not UTF-8."""
    decoder = codecs.getincrementaldecoder("utf-8")()
    offset = 0
    while True:
        data = file.read(piece_bytes)
        pending = len(decoder.getstate()[0])
        try:
            text = decoder.decode(data, final=not data)
        except UnicodeDecodeError as error:
            raise UserError(
                f"{name} is not UTF-8: byte {offset - pending + error.start} cannot be read ({error.reason}); "
                "convert the file first, for example with iconv."
            ) from error
        if text:
            yield text
        if not data:
            return
        offset += len(data)


def encode_pieces(pieces: Iterable[str], tokenizer: Tokenizer) -> Iterator[TokenIds]:
    """Encode a long text piece by piece, giving the tokens that encoding it whole would give.

    Each piece is cut where the text around the cut encodes to the same tokens together as apart; a text without such
    a place (a tokenizer that marks the start of a text, say) is kept until its end and encoded whole.
    """
    text = ""
    for piece in pieces:
        text += piece
        cut = _find_cut(text, tokenizer)
        if cut:
            yield tokenizer.encode(text[:cut])
            text = text[cut:]
    if text:
        yield tokenizer.encode(text)


def _find_cut(text: str, tokenizer: Tokenizer) -> int:
    """Return the last good place to cut, leaving some text behind it to judge by; 0 when there is none."""
    tail = max(0, len(text) - 20 * CUT_CONTEXT)
    for pattern in CUTS:
        places = [match.start() for match in pattern.finditer(text, tail, max(tail, len(text) - CUT_CONTEXT))]
        for cut in places[-1:]:
            left, right = text[max(0, cut - CUT_CONTEXT) : cut], text[cut : cut + CUT_CONTEXT]
            together = tokenizer.encode(left + right)
            if np.array_equal(together, np.concatenate([tokenizer.encode(left), tokenizer.encode(right)])):
                return cut
    return 0
