from __future__ import annotations

import json
from pathlib import Path

import pytest

from samba_lm.cli.main import main
from samba_lm.data.shards import TokenDataset


@pytest.fixture
def corpus(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "books").mkdir()
    for i in range(20):
        (tmp_path / "books" / f"{i}.txt").write_text(f"Book {i}: [bold]naïve[/bold] words, many words.\n" * 5)
    (tmp_path / "books" / "e.py").write_text("print('\x1b[31m')")
    return tmp_path


def run(capsys: pytest.CaptureFixture[str], *words: str) -> tuple[int, str, str]:
    code = main(list(words))
    out, err = capsys.readouterr()
    return code, out, err


def test_prepare_show_verify(corpus: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, out, err = run(
        capsys, "data", "prepare", "books", "--out", "set", "--tokenizer", "bpe:270", "--val-fraction", "0.3",
        "--processes", "1", "--suffix", "py", "--json", "made.json",
    )  # fmt: skip
    assert (code, err) == (0, "")
    assert "set/train: " in out
    made = json.loads((corpus / "made.json").read_text())
    assert made["files"] == 21
    assert made["splits"]["train"]["documents"] + made["splits"]["val"]["documents"] == 21
    assert made["tokenizer"] == {"vocab_size": 270, "eos": "<|endoftext|>"}

    code, out, err = run(capsys, "data", "show", "set", "--document", "1", "--tokens", "40", "--json", "shown.json")
    assert (code, err) == (0, "")
    shown = json.loads((corpus / "shown.json").read_text())
    assert "[bold]naïve[/bold]" in shown["excerpt"]
    assert shown["excerpt"] in out
    tokens = made["splits"]["train"]["tokens"]
    assert f"{tokens:,} tokens" in out
    assert shown["datasets"]["set/train"]["tokens"] == tokens

    code, out, err = run(capsys, "data", "verify", "set", "--json", "whole.json")
    assert (code, err) == (0, "")
    assert "set/val: whole" in out
    assert json.loads((corpus / "whole.json").read_text())["whole"] is True


def test_excerpts_do_not_steer_the_terminal(corpus: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(capsys, "data", "prepare", "books/e.py", "--out", "set")[0] == 0
    out = run(capsys, "data", "show", "set")[1]
    assert "print('\ufffd[31m')" in out
    assert "\x1b" not in out


def test_verify_finds_a_flipped_bit(corpus: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run(capsys, "data", "prepare", "books", "--out", "set")
    path = corpus / "set" / "tokens-00000.npy"
    content = bytearray(path.read_bytes())
    content[500] ^= 1
    path.write_bytes(content)
    TokenDataset.open(corpus / "set")
    code, _, err = run(capsys, "data", "verify", "set")
    assert code == 2
    assert "tokens-00000.npy was changed" in err


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["prepare", "books"], "--out"),
        (["prepare", "--out", "set"], "No input"),
        (["prepare", "bucks", "--out", "set"], "bucks does not exist"),
        (["prepare", "books", "--out", "set", "--tokenizer", "bite"], "Did you mean 'byte'"),
        (["prepare", "books", "--out", "set", "--errors", "ignore"], "ignore"),
        (["prepare", "books", "--out", "set", "--val-fraction", "2"], "val_fraction is 2.0"),
        (["prepare", "books", "--out", "books"], "books already exists"),
        (["show", "books"], "is not prepared data"),
        (["show", "nowhere"], "is not a folder"),
        (["verify", "books"], "is not prepared data"),
        (["show", "good", "--document", "20"], "has documents 0 to 19"),
        (["show", "good", "--tokens", "0"], "--tokens 0"),
    ],
)
def test_mistakes(corpus: Path, capsys: pytest.CaptureFixture[str], words: list[str], message: str) -> None:
    assert run(capsys, "data", "prepare", "books", "--out", "good")[0] == 0
    code, out, err = run(capsys, "data", *words)
    assert (code, out) == (2, "")
    assert err.count("\n") == 1
    assert message in err
    assert not (corpus / "set").exists()
