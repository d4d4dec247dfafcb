"""The chat in a real pseudo-terminal: typing, editing, Ctrl-C, several lines, what is remembered, narrow windows."""

from __future__ import annotations

import json
import os
import stat
from pathlib import Path

import pytest
import torch

pytest.importorskip("pty", reason="this system has no pseudo-terminals")
pytest.importorskip("readline", reason="this Python has no readline")

import readline

from terminal import Terminal, screen

import samba_lm
from samba_lm.cli.chat_view import visible
from samba_lm.config import Attention, Mamba, ModelConfig, SwiGLU
from samba_lm.tokenizer import ByteTokenizer

if "libedit" in (readline.__doc__ or ""):
    pytest.skip("the keys that are typed here are GNU readline's", allow_module_level=True)

UP, LEFT, ALT_ENTER, CTRL_A, CTRL_C, CTRL_D = "\x1b[A", "\x1b[D", "\x1b\r", "\x01", "\x03", "\x04"
ENDLESS = ("--max-tokens", "unlimited", "--no-stop-at-eos")
PROMPT = r"> (?:\x1b\[0m)?$"
MORE = r"\.\.\. (?:\x1b\[0m)?$"


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    layers = (Mamba(), SwiGLU(width=48), Attention(heads=2, window=24), SwiGLU(width=48))
    config = ModelConfig(name="tiny", d_model=32, vocab_size=257, layers=layers, tie_embeddings=False)
    model = samba_lm.create(config, seed=3)
    assert model.unembedding is not None
    with torch.no_grad():
        model.unembedding.mul_(60)
        model.unembedding[:32] = model.unembedding[127:] = 0  # far below the others: plain characters only
        model.unembedding[32] *= 2  # and spaces among them
    folder = tmp_path_factory.mktemp("chat") / "checkpoint"
    samba_lm.save(model, folder, ByteTokenizer())
    return folder


def messages(path: Path) -> str:
    """What was said in a saved conversation, without the answers."""
    parts = path.read_text(encoding="utf-8").split("User: ")[1:]
    return "|".join(part.split("\nAssistant:")[0] for part in parts)


def test_typing_editing_and_what_is_remembered(checkpoint: Path, tmp_path: Path) -> None:
    words = ("chat", checkpoint, "--max-tokens", "3")
    talk, state = tmp_path / "talk.txt", tmp_path / "state"
    history = state / "samba-lm" / "chat-history.jsonl"
    history.parent.mkdir(parents=True)
    history.write_text(json.dumps("```\nof an earlier\nchat\n```") + "\n")
    with Terminal(*words, XDG_STATE_HOME=str(state)) as terminal:
        hint = terminal.wait(PROMPT)
        assert hint.count("A base model") == 1
        terminal.say("helo" + LEFT + "l")
        terminal.say(UP * 2)  # the block, as it was typed
        terminal.say("one\\", MORE)
        terminal.say("two")
        terminal.say("```", MORE)
        terminal.say("  code", MORE)
        terminal.say("```")
        terminal.say("up" + ALT_ENTER + "down")
        terminal.say("\x1b[200~pasted\n/help\x1b[201~")
        terminal.say(UP * 6 + CTRL_A + "Oh, ")
        terminal.say(" a secret")
        # Tab completes commands, settings, names and paths.
        assert "state" in terminal.say("/sta\t")
        assert "(temperature = 0.5)" in terminal.say("/set temp\t0.5")
        terminal.say("/fork aside")
        assert "'main'" in terminal.say("/switch ma\t", r"\('?this is 'main'.*\x1b\[\?2004h.*> (?:\x1b\[0m)?$")
        (tmp_path / "a folder").mkdir()
        begun = str(tmp_path / "a fo")
        terminal.say(f"/save {begun}\ttalk.txt")
        assert (tmp_path / "a folder" / "talk.txt").read_text().startswith("User: hello\n")
        # Ctrl-C drops what is typed, block and all; twice it says how to leave.
        terminal.type("junk")
        terminal.wait("junk")
        assert "leaves" not in terminal.interrupt(PROMPT)
        terminal.say("```", MORE)
        terminal.type("half a block")
        terminal.wait("half a block")
        assert "Ctrl-D or /quit leaves" in terminal.interrupt(r"leaves.*" + PROMPT)
        terminal.say(f"/save {talk}")
        terminal.type(CTRL_D)
        assert terminal.end() == 0
    assert "Traceback" not in terminal.seen
    assert messages(talk) == "hello|of an earlier\nchat|one\ntwo|  code|up\ndown|pasted\n/help|Oh, hello|a secret"
    assert stat.S_IMODE(history.stat().st_mode) == 0o600
    kept = [json.loads(line) for line in history.read_text().splitlines()]
    assert kept[1:6] == ["hello", kept[0], "one\ntwo", "```\n  code\n```", "up\ndown"]
    assert kept[7] == "Oh, hello"
    assert not any("secret" in line or "junk" in line or "half" in line for line in kept)


def test_ctrl_c_stops_the_answer_and_a_narrow_window_breaks_no_word(checkpoint: Path, tmp_path: Path) -> None:
    long, talk = tmp_path / "long.txt", tmp_path / "talk.txt"
    long.write_text("The sea is salt. " * 100_000)
    with Terminal("chat", checkpoint, *ENDLESS, "--no-history", columns=40, HOME=str(tmp_path)) as terminal:
        terminal.wait(PROMPT)
        assert all(len(line) <= 39 for line in screen(terminal.seen, 40))
        terminal.type("hi\r")
        terminal.wait(r"hi\r\n(?:\x1b\[\?2004l\r)?.{2000}")
        terminal.type("<typed>")  # not shown in the middle of the answer; Ctrl-C drops it
        terminal.wait(r".{2000}")
        terminal.type(CTRL_C)
        told = terminal.wait(r"\(stopped\).*> (?:\x1b\[0m)?$")
        assert "^C" not in told
        assert "<typed>" not in terminal.seen
        terminal.resize(24)
        terminal.type("next\r")
        terminal.wait(r"next\r\n(?:\x1b\[\?2004l\r)?.{1000}")
        terminal.resize(60)  # in the middle of an answer
        terminal.wait(r".{1000}")
        terminal.type(CTRL_C)
        terminal.wait(r"\(stopped\).*> (?:\x1b\[0m)?$")
        # What is still being read is taken back; what is typed during an answer that ends comes at the next prompt.
        terminal.type(f"/load {long}\r")
        terminal.wait(r"reading: [\d,]+ tokens")
        terminal.type(CTRL_C)
        terminal.wait(r"\(stopped\).*> (?:\x1b\[0m)?$")
        terminal.say(f"/save {talk}", r"\(written.*> (?:\x1b\[0m)?$")
        terminal.say("/set max_tokens 1500", r"\(max_tokens.*> (?:\x1b\[0m)?$")
        terminal.type("more\r")
        terminal.wait(r"more\r\n(?:\x1b\[\?2004l\r)?.{100}")
        terminal.type("<typed>")
        assert "it ends at max_tokens=1500" in terminal.wait(r"\(it ends.*> (?:\x1b\[0m)?<typed>$")
        assert terminal.seen.count("<typed>") == 1
        terminal.interrupt(PROMPT)
        terminal.type(CTRL_D)
        assert terminal.end() == 0
    assert "Traceback" not in terminal.seen
    assert messages(talk) == "hi|next"
    answers = [part.split("\nUser:")[0] for part in talk.read_text(encoding="utf-8").split("\nAssistant:")[1:]]
    first = terminal.seen.split("hi\r\n", 1)[1].split("\x1b[2m(stopped)", 1)[0].replace("\x1b[?2004l\r", "", 1)
    lines = screen(first, 40)
    assert max(map(len, lines)) <= 39
    shown, true = " ".join(lines).split(), visible(answers[0]).split()
    assert_shown("".join(shown), "".join(true))
    short = [word for word in true if len(word) <= 39]
    assert len(short) > 30
    sure = len(short) - 10  # the last ones may be what Ctrl-C dropped
    assert [word for word in shown if word in set(short)][:sure] == short[:sure]  # each stands whole in a line
    second = terminal.seen.split("(stopped)", 1)[1].split("\r\n", 2)[2].split("\x1b[2m(stopped)", 1)[0]
    second = second.replace("\x1b[?2004l\r", "", 1)
    assert_shown("".join("".join(screen(second, 60)).split()), "".join(visible(answers[1]).split()))
    assert not list(tmp_path.glob(".local/**/*"))  # nothing was remembered


def assert_shown(shown: str, true: str) -> None:
    """The same text, but for what a terminal drops when Ctrl-C is pressed: what it was given and had not shown yet."""
    same = next((i for i, (a, b) in enumerate(zip(shown, true, strict=False)) if a != b), min(len(shown), len(true)))
    assert same >= len(true) - 200
    assert true.endswith(shown[same:])


def test_the_answers_may_go_elsewhere(checkpoint: Path, tmp_path: Path) -> None:
    """A person types, a file takes the answers: the prompts stand among them no more than colours do."""
    out = tmp_path / "out.txt"
    with (
        out.open("wb") as file,
        Terminal("chat", checkpoint, "--max-tokens", "5", "--no-history", stdout=file) as terminal,
    ):
        terminal.wait(r"> $")
        terminal.type("hello\r")
        terminal.wait(r"> $")
        terminal.type(CTRL_D)
        assert terminal.end() == 0
    assert "\x1b" not in out.read_text()
    assert "> " not in out.read_text().splitlines()[-2]
    assert os.stat(out).st_size > 5
