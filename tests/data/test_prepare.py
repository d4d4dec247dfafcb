from __future__ import annotations

import json
import multiprocessing
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from samba_lm.data import encode
from samba_lm.data import prepare as module
from samba_lm.data.prepare import Prepared, prepare
from samba_lm.data.shards import TokenDataset, open_splits
from samba_lm.errors import UserError
from samba_lm.tokenizer import EOS, BpeSpec, ByteTokenizer, train_bpe


@pytest.fixture
def corpus(tmp_path: Path) -> Path:
    folder = tmp_path / "corpus"
    (folder / "sub").mkdir(parents=True)
    (folder / "a.txt").write_text("The first document. naïve 🙂\n" * 30, encoding="utf-8")
    (folder / "empty.txt").write_text("")
    (folder / "sub" / "b.txt").write_text(" \n\t", encoding="utf-8")
    rows = [f"Document {i} says: the number {i * i} is a square of {i}." * (i % 5) for i in range(100)]
    (folder / "sub" / "c.jsonl").write_text("".join(json.dumps({"text": row}) + "\n" for row in rows))
    return folder


def texts_of(dataset: TokenDataset) -> list[str]:
    return [dataset.tokenizer.decode(dataset.document(i)) for i in range(dataset.num_documents)]


def files_of(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def test_documents_come_in_order(corpus: Path, tmp_path: Path) -> None:
    prepared = prepare([corpus], tmp_path / "out", ByteTokenizer())
    dataset = TokenDataset.open(tmp_path / "out")
    texts = texts_of(dataset)
    assert len(texts) == 81
    assert texts[0] == (corpus / "a.txt").read_text(encoding="utf-8")
    assert texts[1] == "Document 1 says: the number 1 is a square of 1."
    assert texts[-1].startswith("Document 99")
    assert prepared.splits == {"": dataset.meta}
    assert (prepared.files, prepared.empty_documents, prepared.notes) == (4, 22, ())
    assert dataset.meta.text_bytes == len("".join(texts).encode())
    dataset.verify()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["corpus", "out"]


def test_a_document_cannot_forge_a_boundary(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text(f"one{EOS}two", encoding="utf-8")
    for number, tokenizer in enumerate([ByteTokenizer(), BpeSpec(300)]):
        prepare([tmp_path / "a.txt"], tmp_path / str(number), tokenizer)
        dataset = TokenDataset.open(tmp_path / str(number))
        assert dataset.num_documents == 1
        assert (dataset.tokens(0, dataset.num_tokens) == dataset.meta.eos_id).sum() == 1
        assert texts_of(dataset) == [f"one{EOS}two"]


def test_same_bytes_whatever_the_processes(corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(encode, "ERRAND_CHARS", 500)
    for processes in (1, 2):
        out = tmp_path / f"out{processes}"
        prepare([corpus], out, BpeSpec(400), processes=processes, val_fraction=0.2, shard_tokens=200)
    one, two = files_of(tmp_path / "out1"), files_of(tmp_path / "out2")
    assert one == two
    assert "train/tokens-00001.npy" in one
    assert "val/meta.json" in one


def test_errors_of_workers_and_readers_arrive(corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(encode, "ERRAND_CHARS", 500)
    (corpus / "sub" / "z.txt").write_bytes(b"x" * 3000 + b"\xff")
    tokenizer = train_bpe(["some text"], 300)
    with pytest.raises(UserError, match=r"z\.txt is not UTF-8: byte 3000"):
        prepare([corpus], tmp_path / "out", tokenizer, processes=2)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["corpus"]
    prepare([corpus], tmp_path / "out", tokenizer, processes=2, errors="replace")
    assert texts_of(TokenDataset.open(tmp_path / "out"))[-1] == "x" * 3000 + "\ufffd"


def test_split_goes_by_text(corpus: Path, tmp_path: Path) -> None:
    prepare([corpus], tmp_path / "whole", ByteTokenizer())
    prepared = prepare([corpus], tmp_path / "split", ByteTokenizer(), val_fraction=0.25)
    train, val = open_splits(tmp_path / "split")
    assert val is not None
    assert prepared.notes == ()
    assert 8 <= val.num_documents <= 35
    assert sorted(texts_of(train) + texts_of(val)) == sorted(texts_of(TokenDataset.open(tmp_path / "whole")))
    # Equal documents stay on one side, wherever they stand: nothing held out was trained on.
    prepare([corpus / "sub", corpus / "a.txt"], tmp_path / "moved", ByteTokenizer(), val_fraction=0.25)
    moved = open_splits(tmp_path / "moved")[1]
    assert moved is not None
    assert sorted(texts_of(moved)) == sorted(texts_of(val))


@pytest.mark.parametrize("fraction", [0.1, 0.5, 0.9, 0.000001])
def test_one_document_is_split_at_its_end(corpus: Path, tmp_path: Path, fraction: float) -> None:
    prepared = prepare([corpus / "a.txt"], tmp_path / "out", ByteTokenizer(), val_fraction=fraction)
    train, val = open_splits(tmp_path / "out")
    assert val is not None
    ids = ByteTokenizer().encode((corpus / "a.txt").read_text(encoding="utf-8"))
    held_out = max(1, round(len(ids) * fraction))
    assert np.array_equal(train.document(0), np.append(ids[:-held_out], 256))
    assert np.array_equal(val.document(0), np.append(ids[-held_out:], 256))
    assert "only one document" in prepared.notes[0]
    assert f"last {held_out:,} of its {len(ids):,} tokens" in prepared.notes[0]
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["train", "val"]


@pytest.mark.parametrize("fraction", [1e-9, 1 - 1e-9])
def test_an_empty_side_gets_the_last_documents(corpus: Path, tmp_path: Path, fraction: float) -> None:
    prepared = prepare([corpus], tmp_path / "out", ByteTokenizer(), val_fraction=fraction)
    train, val = open_splits(tmp_path / "out")
    assert val is not None
    assert min(train.num_documents, val.num_documents) == 1
    assert train.num_documents + val.num_documents == 81
    assert texts_of(val)[-1].startswith("Document 99")
    assert "the last" in prepared.notes[0]
    train.verify()
    val.verify()


def test_an_uneven_split_is_told(tmp_path: Path) -> None:
    for i in range(12):
        (tmp_path / f"{i}.txt").write_text(f"Book {i}. " + "word " * 20)
    even = prepare([tmp_path / f"{i}.txt" for i in range(12)], tmp_path / "even", ByteTokenizer(), val_fraction=0.25)
    assert even.notes == ()
    few = prepare([tmp_path / f"{i}.txt" for i in (0, 1, 7)], tmp_path / "few", ByteTokenizer(), val_fraction=0.1)
    assert "has 33.3% of the tokens, not 10.0%: documents (3 here)" in few.notes[0]


def test_bpe_sample_is_bounded_and_told(corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    full = prepare([corpus], tmp_path / "full", BpeSpec(300))
    assert full.notes == ()
    assert full.tokenizer.vocab_size == 300
    monkeypatch.setattr(module, "BPE_SAMPLE_BYTES", 2000)
    some = prepare([corpus], tmp_path / "some", BpeSpec(300))
    assert some.notes[0].startswith("The BPE was trained on the first 1")
    assert some.tokenizer.fingerprint() != full.tokenizer.fingerprint()
    tiny = prepare([corpus], tmp_path / "tiny", BpeSpec(5000))
    assert f"the BPE has {tiny.tokenizer.vocab_size}" in tiny.notes[-1]


def test_sample_takes_its_share_of_many_files(tmp_path: Path) -> None:
    for i in range(50):
        (tmp_path / f"{i:02}.txt").write_text(f"{i:02}" + "x" * 98)
    from samba_lm.data.sources import ReadOptions, find_files

    files = find_files([tmp_path])
    taken = list(module._sample(files, ReadOptions(), 0.2, None))
    assert 10 <= len(taken) <= 11
    assert int(taken[-1][:2]) > 40  # spread over all of them
    assert len(list(module._sample(files, ReadOptions(), 1.0, None))) == 50


def test_progress_ends_at_the_total(corpus: Path, tmp_path: Path) -> None:
    told: list[tuple[str, int, int]] = []
    prepare([corpus], tmp_path / "out", BpeSpec(300), progress=lambda *report: told.append(report))
    total = sum(path.stat().st_size for path in corpus.rglob("*") if path.is_file())
    for stage in ("training the BPE", "encoding"):
        done = [amount for name, amount, of in told if name == stage and of == total]
        assert done == sorted(done)
        assert done[-1] == total


def test_out_is_not_overwritten_by_mistake(corpus: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    prepare([corpus], out, ByteTokenizer())  # an empty folder is free
    before = files_of(out)
    with pytest.raises(UserError, match=r"out already exists.*--overwrite"):
        prepare([corpus], out, BpeSpec(300))
    (corpus / "bad.txt").write_bytes(b"\xff")
    with pytest.raises(UserError, match="not UTF-8"):
        prepare([corpus], out, BpeSpec(300), overwrite=True)
    assert files_of(out) == before
    (corpus / "bad.txt").unlink()
    prepare([corpus], out, BpeSpec(300), overwrite=True, val_fraction=0.3)
    assert open_splits(out)[1] is not None
    prepare([corpus], out, ByteTokenizer(), overwrite=True)
    assert files_of(out) == before
    with pytest.raises(UserError, match="corpus is not prepared data"):
        prepare([corpus], corpus, ByteTokenizer(), overwrite=True)
    (out / "mine.txt").write_text("text among the shards")
    with pytest.raises(UserError, match=r"out holds the input .*mine\.txt"):
        prepare([out / "mine.txt"], out, ByteTokenizer(), overwrite=True)
    with pytest.raises(UserError, match=r"a\.txt is a file"):
        prepare([corpus], corpus / "a.txt", ByteTokenizer())


@pytest.mark.parametrize("name", ["notes.md", "train/notes.md", "photos/"])
def test_overwrite_removes_nothing_that_prepare_did_not_write(corpus: Path, tmp_path: Path, name: str) -> None:
    out = tmp_path / "out"
    prepare([corpus], out, ByteTokenizer(), val_fraction=0.3)
    mine = out / name
    mine.mkdir() if name.endswith("/") else mine.write_text("mine")
    with pytest.raises(UserError, match=f"{mine} is no prepared data"):
        prepare([corpus], out, ByteTokenizer(), overwrite=True)
    assert mine.exists()


def test_an_empty_name_is_not_the_current_folder(corpus: Path) -> None:
    with pytest.raises(UserError, match="name of an input is empty"):
        prepare([""], corpus / "out", ByteTokenizer())
    with pytest.raises(UserError, match="output folder's name is empty"):
        prepare([corpus], "", ByteTokenizer())


def test_bad_arguments(corpus: Path, tmp_path: Path) -> None:
    def run(**options: object) -> Prepared:
        return prepare([corpus], tmp_path / "out", ByteTokenizer(), **options)  # type: ignore[arg-type]

    for options, words in [
        ({"val_fraction": 1.0}, r"val_fraction is 1\.0"),
        ({"val_fraction": -0.1}, r"val_fraction is -0\.1"),
        ({"val_fraction": float("nan")}, "val_fraction is nan"),
        ({"processes": 0}, "processes is 0"),
        ({"shard_tokens": 0}, "shard_tokens is 0"),
        ({"field": "body"}, "has no field 'body'"),
    ]:
        with pytest.raises(UserError, match=words):
            run(**options)
    with pytest.raises(UserError, match="only white space"):
        prepare([corpus / "sub" / "b.txt"], tmp_path / "out", ByteTokenizer())
    (tmp_path / "one.txt").write_text("x")
    with pytest.raises(UserError, match="too little to set"):
        prepare([tmp_path / "one.txt"], tmp_path / "out", ByteTokenizer(), val_fraction=0.5)
    assert not (tmp_path / "out").exists()


def start_long_run(folder: Path) -> subprocess.Popen[str]:
    """Start a real `data prepare` with two workers, and return once tokens are being written."""
    (folder / "corpus").mkdir()
    (folder / "corpus" / "a.txt").write_text("some words to encode, again and again\n" * 1_000_000)
    train_bpe(["some words"], 260).save(folder / "tok")
    words = ["data", "prepare", "corpus", "--processes", "2", "--tokenizer", "tok", "--out", "out/set"]
    process = subprocess.Popen(
        [sys.executable, "-m", "samba_lm", *words],
        cwd=folder,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    deadline = time.monotonic() + 60
    while not any(path.stat().st_size > 500_000 for path in folder.glob("out/set.tmp-*/tokens-00000.npy")):
        assert process.poll() is None, "it ended too early"
        assert time.monotonic() < deadline
        time.sleep(0.01)
    return process


def test_ctrl_c_leaves_nothing(tmp_path: Path) -> None:
    process = start_long_run(tmp_path)
    os.killpg(process.pid, signal.SIGINT)  # as the terminal does: the workers get it too
    errors = process.communicate(timeout=30)[1]  # returns when the workers, who share stderr, are gone too
    assert process.returncode == 130
    assert "Traceback" not in errors
    assert list((tmp_path / "out").iterdir()) == []


def test_workers_end_with_a_killed_parent(tmp_path: Path) -> None:
    process = start_long_run(tmp_path)
    process.kill()
    process.communicate(timeout=30)
    assert not (tmp_path / "out" / "set").exists()
    # What is left behind does not disturb the next run.
    (tmp_path / "corpus" / "a.txt").write_text("short")
    prepare([tmp_path / "corpus"], tmp_path / "out" / "set", ByteTokenizer())
    assert texts_of(TokenDataset.open(tmp_path / "out" / "set")) == ["short"]


def test_a_killed_worker_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(encode, "ERRAND_CHARS", 100)
    results = encode.encode_in_order((("words " * 50, i) for i in range(1000)), train_bpe(["words"], 260), 2)
    assert next(results)[0] == 0
    workers = multiprocessing.active_children()
    assert len(workers) == 2
    os.kill(workers[0].pid or 0, signal.SIGKILL)
    with pytest.raises(UserError, match=r"exit code -9.*fewer --processes"):
        list(results)
    assert multiprocessing.active_children() == []
