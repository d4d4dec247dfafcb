"""Prompts in chunks: the same tokens as the whole, and files read piece by piece."""

from __future__ import annotations

import argparse
import inspect
import io

import numpy as np
import pytest
import tokenizers
from tokenizers import decoders, models, pre_tokenizers, trainers

from samba_lm.errors import UserError
from samba_lm.generation.prompt import encode_pieces, prompt_chunks, read_text, rechunk
from samba_lm.tokenizer import EOS, ByteTokenizer, FileTokenizer, Tokenizer, train_bpe

SOURCE = inspect.getsource(argparse)


def metaspace_tokenizer() -> Tokenizer:
    """A tokenizer that marks the start of a text with a space, as SentencePiece does."""
    runner = tokenizers.Tokenizer(models.BPE(unk_token="?"))
    runner.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always")
    runner.decoder = decoders.Metaspace(prepend_scheme="always")
    trainer = trainers.BpeTrainer(vocab_size=400, special_tokens=[EOS, "?"], show_progress=False)
    runner.train_from_iterator([SOURCE], trainer=trainer)
    return FileTokenizer(runner.to_str())


@pytest.fixture(scope="module", params=["byte", "bpe", "metaspace"])
def any_tokenizer(request: pytest.FixtureRequest) -> Tokenizer:
    makers = {"byte": ByteTokenizer, "bpe": lambda: train_bpe([SOURCE], 600), "metaspace": metaspace_tokenizer}
    return makers[request.param]()


def pieces(text: str, size: int) -> list[str]:
    return [text[i : i + size] for i in range(0, len(text), size)]


@pytest.mark.parametrize("size", [777, 5000])
def test_a_text_in_pieces_gives_the_tokens_of_the_whole(any_tokenizer: Tokenizer, size: int) -> None:
    text = SOURCE[:40_000] + "\n\n\n   \n\tünïcode 😀😀 \r\n\n end"
    chunks = list(encode_pieces(pieces(text, size), any_tokenizer))
    assert len(chunks) > 5
    assert np.array_equal(np.concatenate(chunks), any_tokenizer.encode(text))


@pytest.mark.parametrize("text", ["word " * 4000, "na" * 10_000, "\n" * 10_000, "x\n" * 5000], ids=repr)
def test_texts_without_lines_or_of_nothing_but_lines(any_tokenizer: Tokenizer, text: str) -> None:
    chunks = list(encode_pieces(pieces(text, 1000), any_tokenizer))
    assert np.array_equal(np.concatenate(chunks), any_tokenizer.encode(text))


def test_bytes_can_be_cut_anywhere_so_one_endless_line_is_not_kept_whole() -> None:
    sizes = [chunk.size for chunk in encode_pieces(pieces("na" * 50_000, 1000), ByteTokenizer())]
    assert sum(sizes) == 100_000
    assert max(sizes) < 2000


@pytest.mark.parametrize("size", [1, 3, 7, 100])
def test_rechunk_keeps_the_tokens_and_fixes_the_size(size: int) -> None:
    parts = [np.arange(5), np.arange(0), np.arange(5, 6, dtype=np.uint16), np.arange(6, 31)]
    chunks = list(rechunk(parts, size))
    assert np.array_equal(np.concatenate(chunks), np.arange(31))
    assert all(chunk.dtype == np.int64 for chunk in chunks)
    assert [chunk.size for chunk in chunks[:-1]] == [size] * (len(chunks) - 1)


def test_a_file_is_read_whole_whatever_the_pieces_cut() -> None:
    text = "a😀é漢\n" * 50
    for size in (1, 2, 3, 5, 64):
        assert "".join(read_text(io.BytesIO(text.encode()), "f", piece_bytes=size)) == text


@pytest.mark.parametrize("size", [1, 4, 1000])
@pytest.mark.parametrize(("data", "byte"), [(b"abc\xff", 3), ("é😀".encode()[:-1], 2), (b"ab\xe2\x82xyz", 2)])
def test_the_byte_that_is_not_utf8_is_named(data: bytes, byte: int, size: int) -> None:
    with pytest.raises(UserError, match=rf"poem\.txt is not UTF-8: byte {byte} "):
        list(read_text(io.BytesIO(data), "poem.txt", piece_bytes=size))


def test_an_empty_prompt_is_the_end_of_the_last_document() -> None:
    tokenizer = ByteTokenizer()
    for prompt in ("", np.zeros(0, dtype=np.int64), [], iter([np.zeros(0, dtype=np.int64)])):
        assert [chunk.tolist() for chunk in prompt_chunks(prompt, tokenizer)] == [[256]]


def test_what_is_no_prompt_is_told() -> None:
    tokenizer = ByteTokenizer()
    with pytest.raises(UserError, match="may not hold int values"):
        list(prompt_chunks([1, 2, 3], tokenizer))  # type: ignore[list-item]
    with pytest.raises(UserError, match=r"float64\[2\] is not a sequence of token ids"):
        list(prompt_chunks(np.array([0.5, 1.5]), tokenizer))  # type: ignore[arg-type]
    with pytest.raises(UserError, match=r"int64\[1, 2\]"):
        list(prompt_chunks(np.array([[1, 2]]), tokenizer))
