from __future__ import annotations

import bz2
import gzip
import json
import lzma
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import tokenizers
from tokenizers import pre_tokenizers

from samba_lm.data import sources
from samba_lm.data.sources import PIECE_CHARS, ReadOptions, SourceFile, cut, find_files, read_file
from samba_lm.errors import UserError
from samba_lm.tokenizer import train_bpe


class Zstd:
    """Of Python's own packers there is none for it before 3.14."""

    @staticmethod
    def compress(data: bytes) -> bytes:
        return bytes(pa.compress(data, codec="zstd", asbytes=True))


def read(path: Path, **options: str) -> list[str]:
    """The documents of a file, put together from their pieces."""
    documents = [""]
    size = path.stat().st_size
    position = 0
    for piece in read_file(SourceFile(path, size), ReadOptions(**options)):  # type: ignore[arg-type]
        documents[-1] += piece.text
        assert position <= piece.position <= size
        position = piece.position
        if piece.end:
            documents.append("")
    assert documents.pop() == ""
    return documents


def write(path: Path, content: bytes | str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return path


def test_text_is_one_document(tmp_path: Path) -> None:
    text = "line\r\nnaïve 🙂\n\nend"
    assert read(write(tmp_path / "a.txt", text)) == [text]
    assert read(write(tmp_path / "code.py", text)) == [text]
    assert read(write(tmp_path / "bom.txt", "\ufeff" + text)) == [text]
    assert read(write(tmp_path / "a.txt.gz", gzip.compress(text.encode()))) == [text]
    assert read(write(tmp_path / "a.TXT.XZ", lzma.compress(text.encode()))) == [text]
    assert read(write(tmp_path / "a.txt.bz2", bz2.compress(text.encode()))) == [text]
    assert read(write(tmp_path / "a.txt.zst", Zstd.compress(text.encode()))) == [text]
    assert read(write(tmp_path / "two.txt.zst", b"".join(Zstd.compress(t) for t in (b"one ", b"two")))) == ["one two"]


def test_long_text_is_streamed_and_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    text = "".join(f"{i} naïve 🙂 café\n" + "\n" * (i % 3) for i in range(20_000))
    path = write(tmp_path / "long.txt", text)
    monkeypatch.setattr(sources, "PIECE_CHARS", 10_000)
    whole = [piece.text for piece in read_file(SourceFile(path, path.stat().st_size), ReadOptions())]
    assert "".join(whole) == text
    assert len(whole) > 20
    # Where a document is cut depends on nothing but its text.
    for block in (1, 7, 4093):
        short = write(tmp_path / "short.txt", text[:25_000])
        monkeypatch.setattr(sources, "_BLOCK_BYTES", block)
        pieces = [piece.text for piece in read_file(SourceFile(short, short.stat().st_size), ReadOptions())]
        assert pieces[:2] == whole[:2]
        assert "".join(pieces) == text[:25_000]


def test_cuts_cannot_be_seen_in_byte_level_tokens(monkeypatch: pytest.MonkeyPatch) -> None:
    text = "".join(f"def f{i}(x):\n\n    # it's   {i}\n    return x\n  \n\n" for i in range(300))
    bpe = train_bpe([text], 500)
    monkeypatch.setattr(sources, "PIECE_CHARS", 200)
    parts = cut(text)
    assert len(parts) > 40
    assert "".join(parts) == text
    assert np.array_equal(np.concatenate(bpe.encode_batch(parts)), bpe.encode(text))


def test_cuts_are_where_words_end(monkeypatch: pytest.MonkeyPatch) -> None:
    # The splitting rule of later byte-level tokenizers (Llama 3's kind): newlines join the punctuation before them.
    rule = r"'[st]|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
    split = pre_tokenizers.Split(tokenizers.Regex(rule), "isolated")
    text = "".join(f"Line {i},   it's\n\n  {i * 977};\n({i});\n\n ½ naïve 漢字\t\n" for i in range(300))
    monkeypatch.setattr(sources, "PIECE_CHARS", 97)
    words = [word for part in cut(text) for word, _ in split.pre_tokenize_str(part)]
    assert words == [word for word, _ in split.pre_tokenize_str(text)]


@pytest.mark.parametrize("text", ["x" * 1000, "word " * 200, "\n" * 1000, " \n" * 500, ""])
def test_text_without_good_lines_is_cut_too(monkeypatch: pytest.MonkeyPatch, text: str) -> None:
    monkeypatch.setattr(sources, "PIECE_CHARS", 64)
    parts = cut(text)
    assert "".join(parts) == text
    assert all(0 < len(part) <= 64 for part in parts[:-1])


def test_not_utf8(tmp_path: Path) -> None:
    bad = b"a" * 100 + "é".encode() + b"\xffz"
    path = write(tmp_path / "a.txt", bad)
    with pytest.raises(UserError, match=rf"{path} is not UTF-8: byte 102 is 0xff.*--errors replace"):
        read(path)
    assert read(path, errors="replace") == ["a" * 100 + "é\ufffdz"]
    with pytest.raises(UserError, match="byte 102 of the unpacked text"):
        read(write(tmp_path / "a.txt.gz", gzip.compress(bad)))


@pytest.mark.parametrize("block", [1, 2, 3, 64, 2**20])
def test_not_utf8_at_any_block(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, block: int) -> None:
    monkeypatch.setattr(sources, "_BLOCK_BYTES", block)
    text = "aé漢🙂" * 10
    with pytest.raises(UserError, match=f"byte {len(text.encode())} is 0xf0"):
        read(write(tmp_path / "cut.txt", text.encode() + "🙂".encode()[:3]))
    with pytest.raises(UserError, match="byte 100 is 0x80"):
        read(write(tmp_path / "bad.txt", (text.encode()[:100]) + b"\x80" + b"abc"))


def test_jsonl(tmp_path: Path) -> None:
    rows = [{"text": "one\ntwo", "n": 1}, {"text": ""}, {"text": "naïve 🙂", "body": "other"}]
    lines = "\n".join(json.dumps(row) for row in rows) + "\n\n"
    for name in ("a.jsonl", "a.ndjson"):
        assert read(write(tmp_path / name, lines)) == [row["text"] for row in rows]
    for name, pack in (("a.jsonl.gz", gzip), ("a.jsonl.xz", lzma), ("a.ndjson.bz2", bz2), ("a.jsonl.zst", Zstd)):
        assert read(write(tmp_path / name, pack.compress(lines.encode()))) == [row["text"] for row in rows]
    assert read(write(tmp_path / "b.jsonl", '\ufeff{"body": "x"}\n{"body": "y"}'), field="body") == ["x", "y"]


@pytest.mark.parametrize(
    ("line", "words"),
    [
        (b'{"text": "a"', "line 2 is not valid JSON"),
        (b'["text"]', "line 2 is not a JSON object"),
        (b'{"txt": "a"}', "line 2 has no field 'text'.*Did you mean 'txt'.*--field"),
        (b'{"text": 5}', "line 2: field 'text' is 5, not a text"),
        (b'{"text": "\xff"}', r"byte 24 \(line 2\) is 0xff"),
        (b'{"text": "\\ud800"}', r"line 2.*U\+D800"),
        (b"[" * 200_000, "line 2 is nested too deeply"),
        (b'{"text": ' + b"9" * 5000 + b"}", "line 2 has a number that is too long"),
        (b"{}", "line 2 has no field 'text': name the text's field. Use --field"),
    ],
)
def test_bad_json_lines(tmp_path: Path, line: bytes, words: str) -> None:
    path = write(tmp_path / "a.jsonl", b'{"text":"ok"}\n' + line + b"\n")
    with pytest.raises(UserError, match=words) as caught:
        read(path)
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_bad_characters_in_json_can_be_replaced(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", b'{"text": "a\xff\\ud800\\ud83d\\ude42"}')
    assert read(path, errors="replace") == ["a\ufffd\ufffd🙂"]


@pytest.mark.parametrize(
    "kind", [pa.string(), pa.large_string(), pa.string_view(), pa.dictionary(pa.int32(), pa.string())]
)
def test_parquet(tmp_path: Path, kind: pa.DataType) -> None:
    texts = ["one", None, "", "naïve 🙂"] * 200
    if pa.types.is_dictionary(kind):
        column = pa.array(texts).dictionary_encode()
    else:
        column = pa.array(texts, type=kind)
    path = tmp_path / "a.parquet"
    pq.write_table(pa.table({"id": list(range(len(texts))), "body": column}), path)
    assert read(path, field="body") == [text or "" for text in texts]
    with pytest.raises(UserError, match=r"no column 'text'.*Known: body, id"):
        read(path)
    with pytest.raises(UserError, match="'id' holds int64, not text"):
        read(path, field="id")


def test_bad_parquet(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"a\.parquet is not a whole Parquet file"):
        read(write(tmp_path / "a.parquet", b"PAR1 this is no such file PAR1"))
    column = pa.StringArray.from_buffers(2, pa.py_buffer(b"\0\0\0\0\2\0\0\0\5\0\0\0"), pa.py_buffer(b"okab\xff"))
    pq.write_table(pa.table({"text": column}), tmp_path / "b.parquet")
    with pytest.raises(UserError, match="byte 2 of row 2 is 0xff"):
        read(tmp_path / "b.parquet")
    assert read(tmp_path / "b.parquet", errors="replace") == ["ok", "ab\ufffd"]


@pytest.mark.parametrize("name", ["a.parquet", "a.jsonl.zst"])
def test_without_pyarrow(tmp_path: Path, name: str) -> None:
    write(tmp_path / name, "x")
    program = (
        "import sys; sys.modules['pyarrow'] = None\n"
        "from pathlib import Path; from samba_lm.data.sources import *\n"
        f"list(read_file(SourceFile(Path('{name}'), 1), ReadOptions()))"
    )
    run = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, cwd=tmp_path)
    assert f'UserError: {name} needs pyarrow to be read: pip install "samba-lm[parquet]"' in run.stderr


@pytest.mark.parametrize(("suffix", "pack"), [(".gz", gzip), (".xz", lzma), (".bz2", bz2), (".zst", Zstd)])
@pytest.mark.parametrize("name", ["a.txt", "a.jsonl"])
def test_damaged_archives(tmp_path: Path, name: str, suffix: str, pack: Any) -> None:
    name += suffix
    packed = pack.compress(b'{"text": "some"}\n' * 1000)
    for content in (packed[:-20], b"not packed at all", packed[:12] + b"\0" * 20):
        path = write(tmp_path / name, content)
        with pytest.raises(UserError, match=f"{path} is not a whole"):
            read(path)


def test_a_zst_file_of_a_long_window(tmp_path: Path) -> None:
    frame = bytes.fromhex("28b52ffd 00 a8 290000") + b"hello"  # a window of 2 GiB, one block
    with pytest.raises(UserError, match=r"a\.txt\.zst was packed with a long window: unpack it first \(zstd -d --long"):
        read(write(tmp_path / "a.txt.zst", frame))


@pytest.mark.parametrize("name", ["a.json", "a.parquet.zst", "a.zip", "a.parquet.gz", "tokens.npy"])
def test_refused_kinds(tmp_path: Path, name: str) -> None:
    with pytest.raises(UserError, match=f"{name} cannot be read: "):
        read(write(tmp_path / name, "{}"))


def test_folders(tmp_path: Path) -> None:
    for name in (
        "b/2.txt",
        "b/10.jsonl",
        "a.txt.gz",
        "c/d/f.jsonl.bz2",
        "c/d/g.txt.xz",
        "z.py",
        "b/.hidden.txt",
        ".git/x.txt",
        "c/d/e.ndjson",
        "n.bin",
    ):
        write(tmp_path / name, "x")

    def names(*inputs: Path, suffixes: tuple[str, ...] = ()) -> list[str]:
        return [str(file.path.relative_to(tmp_path)) for file in find_files(inputs, suffixes)]

    assert names(tmp_path) == ["a.txt.gz", "b/10.jsonl", "b/2.txt", "c/d/e.ndjson", "c/d/f.jsonl.bz2", "c/d/g.txt.xz"]
    assert names(tmp_path, suffixes=("py",)) == names(tmp_path, suffixes=(".PY",))
    assert "z.py" in names(tmp_path, suffixes=("py",))
    assert names(tmp_path / "z.py", tmp_path / "b", tmp_path / "b/2.txt") == ["z.py", "b/10.jsonl", "b/2.txt"]


def test_nothing_to_read(tmp_path: Path) -> None:
    write(tmp_path / "f/a.py", "x")
    write(tmp_path / "f/b.so", b"\0\1")
    empty = write(tmp_path / "empty.txt", "")
    for given, words in [
        (tmp_path / "no.txt", "no.txt does not exist"),
        (empty, "empty.txt is empty"),
        (tmp_path / "f", r"to read its 1 \.py as plain text, add --suffix \.py"),
    ]:
        with pytest.raises(UserError, match=words):
            find_files([given])
    with pytest.raises(UserError, match="No input"):
        find_files([])


def test_pieces_are_small(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", json.dumps({"text": "a line of text\n" * 200_000}))
    sizes = [len(piece.text) for piece in read_file(SourceFile(path, path.stat().st_size), ReadOptions())]
    assert max(sizes) <= PIECE_CHARS
    assert sum(sizes) == 3_000_000
