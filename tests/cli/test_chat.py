"""What can be done in a chat, typed on a pipe: forks, states saved and loaded, settings, mistakes."""

from __future__ import annotations

import io
import re
import stat
import sys
from pathlib import Path

import pytest
import torch

import samba_lm
from samba_lm.cli.chat_commands import COMMANDS, full_attention_bytes, is_command
from samba_lm.cli.main import main
from samba_lm.config import Attention, Mamba, ModelConfig, SwiGLU
from samba_lm.contexts.snapshot import load
from samba_lm.contexts.token_hash import TokenHash
from samba_lm.generation.chat import ChatSession
from samba_lm.generation.params import SamplingParams
from samba_lm.tokenizer import ByteTokenizer

OPTIONS = ["--max-tokens", "12", "--no-stop-at-eos"]
PARAMS = SamplingParams(max_tokens=12, stop_at_eos=False)


def make(folder: Path, seed: int = 3) -> Path:
    layers = (Mamba(), SwiGLU(width=48), Attention(heads=4, kv_heads=2, window=24), SwiGLU(width=48))
    config = ModelConfig(name="tiny", d_model=32, vocab_size=257, layers=layers, tie_embeddings=False)
    model = samba_lm.create(config, seed=seed)
    assert model.unembedding is not None
    with torch.no_grad():
        model.unembedding.mul_(60)
        model.unembedding[:32] = model.unembedding[127:] = 0  # far below the others: plain characters only
    samba_lm.save(model, folder, ByteTokenizer())
    return folder


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make(tmp_path_factory.mktemp("chat") / "checkpoint")


@pytest.fixture
def chat(checkpoint: Path, capsys, monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))

    def run(*lines: str, options: tuple[str, ...] = ()) -> str:
        capsys.readouterr()
        data = "\n".join(lines).encode("utf-8", "surrogateescape")
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(data), encoding="utf-8"))
        assert main(["chat", str(checkpoint), *OPTIONS, *options]) == 0
        out, err = capsys.readouterr()
        assert err == ""
        assert not (tmp_path / "state").exists()  # what comes through a pipe is nobody's typing
        return out

    return run


def said(path: str) -> list[str]:
    """The messages in a saved conversation."""
    return re.findall(r"User: (.*)\nAssistant:", Path(path).read_text(encoding="utf-8"))


def session(checkpoint: Path, *messages: str) -> ChatSession:
    model, tokenizer = samba_lm.load(checkpoint)
    assert tokenizer is not None
    session = ChatSession(model, tokenizer, params=PARAMS)
    for message in messages:
        list(session.ask(message))
    return session


def test_forks_keep_their_own_words(chat) -> None:
    out = chat(
        "one", "/fork side", "two", "/save side.txt", "/switch main", "three", "/fork", "/forks", "/save main.txt",
        "/drop side", "/switch side", "/drop fork", "/fork main", "/fork a/b", "/switch mian",
    )  # fmt: skip
    assert said("side.txt") == ["one", "two"]
    assert said("main.txt") == ["one", "three"]
    assert "(this is 'side', a copy: /switch main goes back)" in out
    assert "(this is 'main': 1 turn, 32 tokens, " in out
    assert re.search(r"^    main  2 turns, \d+ tokens, .*\n    side  2 turns, .*\n  \* fork  2 turns", out, re.M)
    assert "(There is no conversation 'side'. Known: fork, main.)" in out
    assert "('fork' is where you are: /switch to another first, or /reset.)" in out
    assert "(There is a conversation 'main' already: take another name, or /drop main.)" in out
    assert "('a/b' is no name: " in out
    assert "(There is no conversation 'mian'. Did you mean 'main'?)" in out


def test_a_state_is_saved_and_gone_on_with_to_the_bit(chat, checkpoint: Path) -> None:
    out = chat("one", "two", "/save talk.ctx", "three", "/save whole.txt")
    assert stat.S_IMODE(Path("talk.ctx").stat().st_mode) == 0o600
    later = chat("/load talk.ctx", "three", "/save rest.txt", "/save again.ctx")
    whole, before = Path("whole.txt").read_text(), session(checkpoint, "one", "two")
    assert Path("rest.txt").read_text() == whole[len(before.text) :]
    assert "of 'talk.ctx'; no words are in it)" in later
    after = chat("/load talk.ctx", "/load rest.txt")
    assert re.search(r"\(read (\d+) tokens of rest\.txt after (\d+) tokens of 'talk\.ctx'\)", after), after
    assert out.splitlines()[-3] == later.splitlines()[1]
    assert whole.endswith(out.splitlines()[-3])

    model, tokenizer = samba_lm.load(checkpoint)
    assert tokenizer is not None
    talk, again = load("talk.ctx", model, tokenizer), load("again.ctx", model, tokenizer)
    assert talk.read == TokenHash().add(before.token_ids)
    assert again.read == TokenHash().add(session(checkpoint, "one", "two", "three").token_ids)
    assert again.title == "again.ctx (talk.ctx)"
    assert talk.seen is not None
    assert set(talk.seen[0].nonzero().flatten().tolist()) == set(before.token_ids.tolist())
    assert again.seen is not None
    assert bool((again.seen | ~talk.seen).all())  # what the context had read is noted too


def test_a_text_is_loaded_beside_what_was_said(chat) -> None:
    first = chat("one", "two", "/save talk.txt", "three")
    later = chat("hello", "/load talk.txt", "three", "/save more.txt", "/switch main", "/save main.txt")
    assert first.splitlines()[-2] == later.splitlines()[2]
    assert said("more.txt") == ["one", "two", "three"]
    assert said("main.txt") == ["hello"]
    assert "this is 'talk', /switch main goes back)" in later


def test_a_context_is_talked_about(chat, checkpoint: Path) -> None:
    Path("sea.txt").write_text("The sea is salt. " * 20)
    assert main(["context", "save", str(checkpoint), "--from", "sea.txt", "--out", "sea.ctx"]) == 0
    outs = [
        chat("Is it?", "/context", options=("--context", "sea.ctx", "--system", "Be kind.")),
        chat("/context sea.ctx", "Is it?", "/context", options=("--system", "Be kind.")),
        chat("/context sea.txt", "Is it?", "/context", options=("--system", "Be kind.")),
    ]
    answers = [out.split("(about ")[-1].partition("\n")[2] if "(about " in out else out for out in outs]
    told = [answer.replace("sea.ctx", "sea.txt") for answer in answers]
    assert told[1] == told[2]
    assert "(340 tokens of 'sea.txt')" in told[0]
    assert told[0].partition("(340")[0].endswith(told[1].partition("(340")[0])
    assert "(no context: /context FILE)" in chat("/context")


def test_another_answer_and_none(chat) -> None:
    out = chat("one", "two", "/retry", "/save a.txt", "/undo", "/save b.txt", "/undo", "/undo", "/retry", "/set seed")
    assert said("a.txt") == ["one", "two"]
    assert said("b.txt") == ["one"]
    lines = out.splitlines()
    assert lines[1] != lines[2]  # two answers to "two"
    assert Path("a.txt").read_text().endswith(lines[2])
    assert "(taken back: two)" in out
    assert out.count("(There is no turn to take back: say something first.)") == 2
    assert "(seed = 1)" in out  # the retry took the next one
    assert "always the same" in chat("/set temperature 0", "one", "/retry")


def test_settings(chat) -> None:
    out = chat(
        "/set", "/set temperature 0.7", "/set temperature=0.5", "/set top_k 5", "/set top_k all", "/set top_k five",
        "/set max_tokens unlimited", "/set max_tokens 3", "/set stop_at_eos off", "/set stop_at_eos maybe",
        r"/set stop \nEnd", "/set stop none", "/set temprature 1", "/set temperature nan", "/set top_p 2",
        "/set seed " + "9" * 5000, "/set temperature inf", "hello",
    )  # fmt: skip
    for line in (
        "  temperature         1.0",
        "(temperature = 0.7)",
        "(temperature = 0.5)",
        "(top_k = all)",
        "(top_k = 'five' is no whole number, or all.)",
        "(max_tokens = unlimited)",
        "(stop_at_eos = off)",
        "(stop_at_eos = 'maybe' is no switch, on or off.)",
        r"(stop = '\nEnd')",
        "(stop = none)",
        "('temprature' is no setting. Did you mean 'temperature'?)",
        "(temperature=nan is out of range: it must be 0 (greedy) or more.)",
        "(top_p=2.0 is out of range: it must be more than 0 and at most 1 (1 turns it off).)",
        f"(seed = '{'9' * 40}' is no whole number.)",
        "(temperature=inf is out of range: it must be 0 (greedy) or more.)",
    ):
        assert line in out.splitlines(), line
    assert len(out.splitlines()[-2]) <= 3  # tokens of the last answer


def test_figures(chat, checkpoint: Path) -> None:
    Path("sea.txt").write_text("The sea is salt. " * 20)
    out = chat("/stats", "/context sea.txt", "hello", "/fork", "/stats")
    model, _ = samba_lm.load(checkpoint)
    first, second = out.split("(about")
    assert re.search(r"^  tokens read +0$", first, re.M)
    assert "last answer" not in first
    for pattern in (
        r"conversation +fork: 1 turn",
        r"tokens read +375",
        r"of the context +340 \(sea\.txt\)",
        r"state +[\d.]+KB, however much is read",
        # 2 mixers, keys and values of 2 heads of 8, fp32
        r"full attention +96\.0KB in a model of this size",
        r"last message +23 tokens, [\d,.]+ tokens/s",
        r"last answer +12 tokens, [\d,.]+ tokens/s",
        r"all forks +2 conversations, ",
    ):
        assert re.search(f"^  {pattern}", second, re.M), pattern
    assert full_attention_bytes(model.config, 375, 4) == 2 * 375 * 2 * 16 * 4
    full = model.config.with_overrides(layers=[Attention(heads=4, kv_heads=2).model_dump()] * 2)
    assert full.state_bytes(375, activation_bytes=4) == full_attention_bytes(model.config, 375, 4)


def test_a_system_text(chat) -> None:
    chat(
        "/system Be kind.\\", "Be short.", "one", '/system ""', "/reset", "two", "/save none.txt", "/system x", "/undo"
    )
    assert Path("none.txt").read_text().startswith("User: two\n")
    out = chat("/system Be kind.\\", "Be short.", "/system", "one", "/save talk.txt")
    assert Path("talk.txt").read_text().startswith("Be kind.\nBe short.\n\nUser: one\n")
    assert "(it will stand before the first message)" in out


def test_messages_of_several_lines(chat) -> None:
    chat("one\\", "two", "```", "/help", "  code", "```", " /help", "/usr/bin/python?", "/save talk.txt")
    text = Path("talk.txt").read_text()
    for message in ("one\ntwo", "/help\n  code", "/help", "/usr/bin/python?"):
        assert f"User: {message}\nAssistant:" in text


def test_mistakes_are_one_line_and_the_conversation_goes_on(chat, checkpoint: Path, tmp_path: Path) -> None:
    other = make(tmp_path / "other", seed=4)
    Path("text").write_text("a text")
    Path("latin").write_bytes(b"caf\xe9")
    Path("empty").touch()
    Path("bad.ctx").write_bytes(b"what")
    assert main(["context", "save", str(other), "--from", "text", "--out", "other.ctx"]) == 0
    assert main(["context", "save", str(checkpoint), "--from", "text", "--out", "own.ctx"]) == 0
    own = Path("own.ctx")
    own.rename("own")  # a context all the same
    mistakes = {
        "/save": "(/save needs a file: such as talk.txt, or talk.ctx for the state.)",
        "/switch": "(/switch needs a name: /forks lists them.)",
        "/save empty.ctx": "(Nothing was read yet, so there is no context to keep: read at least one token.)",
        "/save own": "(own is a context, which a text would replace: give another name.)",
        "/save bad.ctx": "Nothing was read yet",
        "/save .": "(. is a folder: give a file in it, such as talk.txt.)",
        "/save text/a.txt": "(File exists: text. Give another path.)",
        "/save ~nobody-here/x": "(~nobody-here/x names a home that is not known here: write the path out.)",
        "/load nowhere": "(nowhere does not exist: give a text, or a context's file (.ctx).)",
        "/load /dev/zero": "(/dev/zero is no file: ",
        "/load .": "(. is a folder: ",
        "/load latin": "(latin is not UTF-8: byte 3 cannot be read; convert the file first.)",
        "/load empty": "(The text is empty: there is no conversation in it.)",
        "/load bad.ctx": "(bad.ctx is no context, or its beginning is damaged: ",
        "/load other.ctx": "(other.ctx was made by other weights of 'tiny'",
        "/context other.ctx": "(other.ctx was made by other weights of 'tiny'",
        "/context latin": "(latin is not UTF-8: byte 3 ",
        "/context empty": "(empty is empty: there is nothing to read.)",
        "/load a\0b": "(/load was given a zero byte: leave it out.)",
        "/reset now": "(/reset takes nothing after it, and was given 'now'.)",
        "/sav x": "(/sav is not a command. Did you mean '/save'? A message may begin with / after a space.)",
        "/": "(/ is not a command.",
        "caf\udce9": "(Text is not valid Unicode: character 9 is the lone surrogate U+DCE9;",
    }
    lines = chat(*mistakes, "/load own", "hello", "/save talk.txt").splitlines()
    # An answer that fails has a line of its own before.
    lines = [line for line in lines if line]
    for line, (typed, message) in zip(lines, mistakes.items(), strict=False):
        assert message in line, (typed, line)
    assert "(it goes on after 6 tokens of 'text'; no words are in it)" in lines
    assert said("talk.txt") == ["hello"]
    assert Path("bad.ctx").read_bytes() == b"what"


def test_what_is_a_command() -> None:
    assert all(map(is_command, ["/help", "/save a b", "/set x\ny", "/foo", "/", "/?"]))
    assert not any(map(is_command, ["help", "/usr/bin", "/Users", "/5", "//", "a /help"]))
    assert all(map(is_command, COMMANDS))
