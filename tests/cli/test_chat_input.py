"""What is typed: messages of several lines, what is remembered of them, and where."""

from __future__ import annotations

import io
import json
import os
import stat
import sys
from pathlib import Path

import pytest

from samba_lm.cli import chat_input
from samba_lm.cli.chat_input import Entry, History, Prompt, history_path


@pytest.fixture
def prompt(monkeypatch: pytest.MonkeyPatch):
    def typed(text: str | bytes) -> Prompt:
        data = text if isinstance(text, bytes) else text.encode()
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(data), encoding="utf-8"))
        return Prompt(sys.stdin, History(None), lambda line: [], colour=False)

    return typed


@pytest.mark.parametrize(
    ("typed", "text", "plain"),
    [
        ("  hello \n", "hello", True),
        ("hello\n", "hello", False),
        ("one\\\ntwo\\\n three\n", "one\ntwo\n three", False),
        ("C:\\\\\n", "C:\\\\", False),  # two of them are two of them
        ("C:\\ \n", "C:\\", False),
        ("one\\\n", "one\\", False),  # nothing follows
        ("```\n  def f():\n\n/help\n```\n", "  def f():\n\n/help", True),
        ("```python\nx\n```\n", "```python\nx\n```", True),
        ("```\nnever ended", "never ended", True),
        ("``` is a fence\n", "``` is a fence", False),
        ("```\n```\n", "", True),
        ("/system one\\\ntwo\n", "/system one\ntwo", False),
    ],
)
def test_one_message(prompt, typed: str, text: str, plain: bool) -> None:
    reading = prompt(typed)
    assert reading.read("> ") == Entry(text, plain)
    with pytest.raises(EOFError):
        reading.read("> ")


def test_bytes_that_are_no_text_are_left_to_the_tokenizer(prompt) -> None:
    assert prompt(b"caf\xe9\n").read("> ").text == "caf\udce9"


def test_the_place(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    for state in ("", "relative/place"):  # as the XDG specification has it: a relative path counts for nothing
        monkeypatch.setenv("XDG_STATE_HOME", state)
        assert history_path() == tmp_path / ".local" / "state" / "samba-lm" / "chat-history.jsonl"
    monkeypatch.setenv("XDG_STATE_HOME", "/elsewhere")
    assert history_path() == Path("/elsewhere/samba-lm/chat-history.jsonl")


def test_lines_are_remembered_for_their_owner_alone(tmp_path: Path) -> None:
    path = tmp_path / "state" / "samba-lm" / "history"
    one, two = History(path), History(path)  # two chats at once
    assert one.add("hello")
    assert not one.add("hello")
    assert not one.add(" a secret")
    assert not one.add("x" * 20_000)
    assert not one.add("zero\0byte")
    assert two.add("é😀\nand \udce9 more")
    assert one.add("bye")
    assert History(path).entries == ["hello", "é😀\nand \udce9 more", "bye"]
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert stat.S_IMODE(path.parent.stat().st_mode) == 0o700
    path.chmod(0o644)
    assert one.add("again")
    assert stat.S_IMODE(path.stat().st_mode) == 0o600


def test_a_damaged_file_loses_its_damaged_lines(tmp_path: Path) -> None:
    path = tmp_path / "history"
    lone = json.dumps("\ud800")  # no terminal sends it, and readline cannot take it
    path.write_bytes(b'"one"\n\xff\xfe\n{"a": 1}\n' + b"[" * 5000 + f'\n{lone}\n"two"\n"thr'.encode())
    history = History(path)
    assert (history.entries, history.trouble) == (["one", "two"], None)
    assert history.add("four")
    assert History(path).entries == ["one", "two", "four"]


def test_the_file_does_not_grow_for_ever(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(chat_input, "REMEMBERED", 10)
    path = tmp_path / "history"
    path.write_text("".join(f'"{number}"\n' for number in range(21)))
    assert History(path).entries == [str(number) for number in range(11, 21)]
    assert len(path.read_text().splitlines()) == 10
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert os.listdir(tmp_path) == ["history"]


def test_a_place_that_cannot_be_used_is_told(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    history = History(tmp_path / "file" / "history")
    assert history.add("hello")  # in this chat it is remembered
    assert history.entries == ["hello"]
    assert history.trouble is not None
    assert history.trouble.startswith(f"what you type is not remembered: {tmp_path}/file/history: ")
    assert History(tmp_path).trouble == f"what you type is not remembered: {tmp_path}: {tmp_path} is no file"
