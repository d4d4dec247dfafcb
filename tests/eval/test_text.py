"""Text files as documents of tokens, whatever files and pieces they come in."""

from __future__ import annotations

import json
import lzma
from pathlib import Path

import numpy as np
import pytest

from samba_lm.data import sources
from samba_lm.data.prepare import prepare
from samba_lm.data.shards import TokenDataset
from samba_lm.data.sources import ReadOptions, find_files
from samba_lm.errors import UserError
from samba_lm.eval import text
from samba_lm.eval.text import Documents
from samba_lm.tokenizer import ByteTokenizer, train_bpe

BOOKS = ["The sea is salt.\n" * 40, "  \n", "naïve café 漢字 🙂\n" * 30, "end"]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "a.txt").write_text(BOOKS[0])
    (tmp_path / "b.jsonl.xz").write_bytes(
        lzma.compress("".join(json.dumps({"text": t}) + "\n" for t in BOOKS).encode())
    )
    return tmp_path


def _read(folder: Path, tokenizer: object = None) -> Documents:
    return Documents.read(find_files([folder]), tokenizer or ByteTokenizer(), ReadOptions())  # type: ignore[arg-type]


def test_documents_are_those_of_data_prepare(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = _read(folder)
    assert [name.removeprefix(f"{folder}/") for name in whole.names] == [
        "a.txt",
        *(f"b.jsonl.xz:{i}" for i in (1, 2, 3)),
    ]
    assert whole.text_bytes == sum(len(book.encode()) for book in (BOOKS[0], BOOKS[0], BOOKS[2], BOOKS[3]))
    for tokenizer in (ByteTokenizer(), train_bpe(BOOKS, 300)):
        prepare([folder], folder / "shards" / tokenizer.fingerprint()[:4], tokenizer)
        dataset = TokenDataset.open(folder / "shards" / tokenizer.fingerprint()[:4])
        read = _read(folder, tokenizer)
        assert read.sha256 == whole.sha256  # of the text, not of the tokens
        for i, document in enumerate(read.tokens):
            assert np.array_equal(document, dataset.document(i))
            assert document[-1] == tokenizer.eos_id
    # However small the pieces and the batches are.
    monkeypatch.setattr(sources, "PIECE_CHARS", 50)
    monkeypatch.setattr(sources, "_BLOCK_BYTES", 60)
    monkeypatch.setattr(text, "_ENCODED_AT_ONCE", 120)
    told: list[float] = []
    small = Documents.read(
        find_files([folder / "a.txt", folder / "b.jsonl.xz"]), ByteTokenizer(), ReadOptions(), told.append
    )
    assert (small.names, small.sha256, small.text_bytes) == (whole.names, whole.sha256, whole.text_bytes)
    assert all(np.array_equal(ours, theirs) for ours, theirs in zip(small.tokens, whole.tokens, strict=True))
    assert told == sorted(told)
    assert len(told) > 10
    assert told[-1] == 1


def test_where_documents_end_is_part_of_the_text(tmp_path: Path) -> None:
    for name, texts in (("one", ["salt sea"]), ("two", ["salt ", "sea"]), ("three", ["salt", " sea"])):
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps({"text": t}) + "\n" for t in texts))
    digests = {_read(path).sha256 for path in tmp_path.iterdir()}
    assert len(digests) == 3


def test_no_text(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text(" \n\t")
    with pytest.raises(UserError, match=r"No text in the input: .*a\.txt and the others hold only white space"):
        _read(tmp_path)
