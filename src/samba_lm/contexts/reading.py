"""Reading a text of any length into a snapshot, in memory that does not depend on the length."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import BinaryIO

from samba_lm.contexts.snapshot import Snapshot
from samba_lm.contexts.token_hash import TokenHash
from samba_lm.errors import UserError
from samba_lm.generation.params import DEFAULT_CHUNK, SamplingParams
from samba_lm.generation.prefill import OnProgress, Reader, prefill
from samba_lm.generation.prompt import Prompt, TokenIds, encode_pieces, prompt_chunks, read_text
from samba_lm.generation.stream import check_request
from samba_lm.model import SambaLM, evaluating
from samba_lm.tokenizer import Tokenizer

NOTING = SamplingParams(repetition_penalty=2.0)
"""Asks a reader to note which tokens it read, for whoever goes on with a repetition penalty."""


def read_file(
    model: SambaLM,
    tokenizer: Tokenizer,
    file: BinaryIO,
    title: str,
    *,
    after: Snapshot | None = None,
    chunk: int = DEFAULT_CHUNK,
    on_progress: OnProgress | None = None,
) -> Snapshot:
    """:func:`read` for a UTF-8 file, read in pieces and never whole. Raises UserError where it is not UTF-8 too."""
    ids = encode_pieces(read_text(file, title or "The text"), tokenizer)
    return read(model, tokenizer, ids, title, after=after, chunk=chunk, on_progress=on_progress)


def read(
    model: SambaLM,
    tokenizer: Tokenizer,
    prompt: Prompt,
    title: str = "",
    *,
    after: Snapshot | None = None,
    chunk: int = DEFAULT_CHUNK,
    on_progress: OnProgress | None = None,
) -> Snapshot:
    """Read a text, token ids [L] or an iterator of such arrays, from nothing or going on ``after`` a snapshot.

    Args:
        title: what people will know it by.
        chunk: tokens read at once; more is faster and takes more memory.
        on_progress: called with the number of tokens read here so far, after each chunk.

    Raises UserError for an empty text, token ids outside the vocabulary, a tokenizer that does not fit the model, and
    where full attention would need more than max_context.
    """
    check_request(model, tokenizer, chunk)
    hashed = [TokenHash() if after is None else after.read]
    before = hashed[0].tokens

    def noted() -> Iterator[TokenIds]:
        for ids in prompt_chunks(prompt, tokenizer, begins=False):
            hashed[0] = hashed[0].add(ids)
            yield ids

    chunks: Iterable[TokenIds] = noted()
    with evaluating(model):
        reader = Reader.create(model, NOTING, batch=1, context=None if after is None else after.reader())
        tell = None if on_progress is None else lambda tokens: on_progress(tokens - before)
        prefill(model, [chunks], reader, chunk, tell)
    if hashed[0].tokens == before:
        raise UserError(f"{title or 'The text'} is empty: there is nothing to read.")
    return Snapshot.of(reader, hashed[0], title)
