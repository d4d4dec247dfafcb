"""``samba-lm context``, ``ask`` and ``--context`` as a person runs them."""

from __future__ import annotations

import io
import json
import os
import re
import stat
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import samba_lm
from samba_lm.cli.ask import NANO, WORDING, worded
from samba_lm.cli.main import main
from samba_lm.config import Attention, Mamba, ModelConfig, SwiGLU
from samba_lm.contexts.reading import read
from samba_lm.contexts.snapshot import load
from samba_lm.contexts.token_hash import TokenHash
from samba_lm.errors import UserError
from samba_lm.generation.params import SamplingParams
from samba_lm.tokenizer import ByteTokenizer

GREEDY = ["--temperature", "0", "--max-tokens", "40", "--no-stop-at-eos"]
PARAMS = SamplingParams(temperature=0, max_tokens=40, stop_at_eos=False)
TEXT = "The sea is salt, as the tears are; and the sand: é.\n" * 100


def make(folder: Path, seed: int, window: int | None = 64) -> Path:
    layers = (Mamba(), SwiGLU(width=48), Attention(heads=2, window=window), SwiGLU(width=48))
    config = ModelConfig(name="tiny", d_model=32, vocab_size=257, layers=layers, tie_embeddings=False)
    model = samba_lm.create(config, seed=seed)
    assert model.unembedding is not None
    with torch.no_grad():
        model.unembedding.mul_(20)
        model.unembedding[128:] = 0  # mostly plain letters
    samba_lm.save(model, folder, ByteTokenizer())
    return folder


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make(tmp_path_factory.mktemp("context") / "checkpoint", seed=3)


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("context") / "sea.txt"
    path.write_text(TEXT, encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def book(checkpoint: Path, text: Path) -> Path:
    path = text.with_name("sea.ctx")
    assert main(["context", "save", str(checkpoint), "--from", str(text), "--out", str(path)]) == 0
    return path


def run(capsys: pytest.CaptureFixture[str], *words: object) -> tuple[str, str]:
    """What a command that succeeds writes to stdout and stderr."""
    capsys.readouterr()
    assert main([str(word) for word in words]) == 0
    return capsys.readouterr()


def error(capsys: pytest.CaptureFixture[str], *words: object) -> str:
    capsys.readouterr()
    assert main([str(word) for word in words]) == 2
    told = capsys.readouterr()
    assert told.out == ""
    assert told.err.count("\n") == 1
    return told.err


@pytest.fixture
def stdin(monkeypatch: pytest.MonkeyPatch):
    def give(text: str) -> None:
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(text.encode()), encoding="utf-8"))

    return give


def test_a_text_is_read_into_a_file(checkpoint: Path, text: Path, tmp_path: Path, capsys, stdin) -> None:
    out, figures = tmp_path / "a.ctx", tmp_path / "figures.json"
    told, err = run(capsys, "context", "save", checkpoint, "--from", text, "--out", out, "--json", figures)
    tokens = len(TEXT.encode())
    assert re.fullmatch(
        rf"read {tokens:,} tokens in [\d.]+ s \([\d,]+ tokens/s\); .*a\.ctx takes [\d.]+KB, however much was read\n",
        told,
    )
    assert err == ""
    assert stat.S_IMODE(out.stat().st_mode) == 0o600
    record = json.loads(figures.read_text())
    assert (record["title"], record["tokens"], record["bytes"]) == ("sea.txt", tokens, out.stat().st_size)
    assert record["token_hash"] == TokenHash().add(ByteTokenizer().encode(TEXT)).hexdigest()

    stdin(TEXT)
    other = tmp_path / "b.ctx"
    run(capsys, "context", "save", checkpoint, "--from", "-", "--out", other, "--title", "The sea")
    model, tokenizer = samba_lm.load(checkpoint)
    assert tokenizer is not None
    a, b = load(out, model, tokenizer), load(other, model, tokenizer)
    assert (a.title, b.title) == ("sea.txt", "The sea")
    assert a.read == b.read
    assert torch.equal(a.logits, b.logits)


def test_generate_goes_on_as_in_memory(checkpoint: Path, book: Path, capsys, tmp_path: Path) -> None:
    model, tokenizer = samba_lm.load(checkpoint)
    assert tokenizer is not None
    context = read(model, tokenizer, TEXT).reader()
    for prompt in ("", " And then"):
        figures = tmp_path / "figures.json"
        words = ["--prompt", prompt] if prompt else []
        out, err = run(capsys, "generate", checkpoint, "--context", book, *words, *GREEDY, "--json", figures)
        assert out == samba_lm.generate(model, tokenizer, prompt, PARAMS, context=context) + "\n"
        assert err.startswith(
            f"went on after {len(TEXT.encode()):,} tokens of 'sea.txt', read {len(prompt)} tokens in "
        )
        record = json.loads(figures.read_text())
        assert (record["context_tokens"], record["prompt_tokens"]) == (len(TEXT.encode()), len(prompt))
    assert out != run(capsys, "generate", checkpoint, *words, *GREEDY)[0]


def test_a_context_is_read_on(checkpoint: Path, book: Path, text: Path, capsys, tmp_path: Path) -> None:
    more, both = tmp_path / "more.txt", tmp_path / "both.ctx"
    more.write_text("And the moon.")
    before = book.read_bytes()
    told, _ = run(capsys, "context", "save", checkpoint, "--context", book, "--from", more, "--out", both)
    assert told.startswith(f"read 13 tokens after the {len(TEXT.encode()):,} of 'sea.txt' in ")
    assert book.read_bytes() == before
    out, _ = run(capsys, "generate", checkpoint, "--context", both, *GREEDY)
    assert out == run(capsys, "generate", checkpoint, "--context", book, "--prompt", "And the moon.", *GREEDY)[0]


def test_a_question_is_answered_from_a_context_a_text_both_or_nothing(
    checkpoint: Path, book: Path, text: Path, capsys, stdin
) -> None:
    model, tokenizer = samba_lm.load(checkpoint)
    assert tokenizer is not None
    question = "\n\nQuestion: Is it salt?\nAnswer:"

    def expected(prompt: str, stop: str = "\nQuestion:") -> str:
        return samba_lm.generate(model, tokenizer, prompt, PARAMS.replace(stop=stop)).lstrip() + "\n"

    def ask(*words: object) -> str:
        return run(capsys, "ask", checkpoint, " Is it salt? ", *words, *GREEDY)[0]

    assert ask("--context", book) == expected(TEXT + question)
    assert ask("--file", text) == expected(TEXT + question)
    stdin(TEXT)
    assert ask("--file", "-") == expected(TEXT + question)
    assert ask("--context", book, "--file", text) == expected(TEXT + TEXT + question)
    assert ask() == expected(question.lstrip())
    assert ask("--context", book, "--wording", r" Q {question}\nA") == expected(TEXT + " Q Is it salt?\nA", "\nQ")
    assert len({ask("--context", book), ask("--context", book), ask()}) == 2

    def begun(*words: object) -> str:
        return run(capsys, "ask", checkpoint, "Is it salt? It is", *words, *GREEDY)[0]

    assert TEXT.endswith("\n")
    assert begun("--file", text) == expected(TEXT + "Is it salt? It is", "\n"), "one line break, not two"
    stdin(TEXT.rstrip())
    assert begun("--file", "-") == expected(TEXT + "Is it salt? It is", "\n")
    assert begun() == expected("Is it salt? It is", "\n")


def test_the_wording() -> None:
    assert worded(WORDING, "Who?") == ("\n\nQuestion: Who?\nAnswer:", ("\nQuestion:",))
    assert worded("{question}", r" a\nb ") == (r"a\nb", ())  # what was asked stays as it is
    for question in ("Who?", "Who is it", "Who? Where?", "Who? ", "Tell me."):
        assert worded(None, question) == worded(WORDING, question)
    assert worded(None, "Who is it? It is ") == ("\nWho is it? It is", ("\n",)), "its answer is begun"
    assert worded(None, "Who is it?", NANO) == ("\nWho is it? The answer is", ("\n",))
    assert worded(None, "Who is it? It is", NANO) == ("\nWho is it? It is", ("\n",))
    assert worded(WORDING, "Who is it? It is")[0].startswith("\n\nQuestion: Who is it? It is\n")
    with pytest.raises(UserError, match="has no place for the question"):
        worded("Question:", "Who?")


def test_a_conversation_about_a_context(checkpoint: Path, book: Path, capsys, stdin) -> None:
    answers = []
    for words in (["--context", str(book)], []):
        stdin("Is it salt?\n/reset\nIs it salt?\n")
        answers.append(run(capsys, "chat", checkpoint, *words, *GREEDY)[0])
        first, second = answers[-1].split("(the conversation is forgotten)\n")
        assert first.rstrip("\n") == second.rstrip("\n")
    assert answers[0] != answers[1]


def test_contexts_are_shown(checkpoint: Path, book: Path, text: Path, capsys, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    other = make(tmp_path / "other", seed=4)
    full = make(tmp_path / "full", seed=4, window=None)
    more = [tmp_path / "other.ctx", tmp_path / "full.ctx"]
    run(capsys, "context", "save", other, "--from", text, "--out", more[0], "--title", "[red]brackets[/red]")
    told, _ = run(capsys, "context", "save", full, "--from", text, "--out", more[1])
    assert told.endswith("MB: with full attention it grows with the text\n")
    figures = tmp_path / "figures.json"
    out, err = run(capsys, "context", "show", book, *more, "--checkpoint", checkpoint, "--json", figures)
    lines = out.splitlines()
    assert lines[0].split() == ["file", "tokens", "size", "title", "model", "dtype", "created", "fits"]
    tokens = f"{len(TEXT.encode()):,}"
    assert re.search(rf"sea\.ctx +{tokens} +[\d.]+KB +sea\.txt +tiny +float32 +\d{{4}}-\d\d-\d\d \d\d:\d\d +yes", out)
    assert re.search(rf"other\.ctx +{tokens} +[\d.]+KB +\[red\]brackets\[/red\] +tiny .* no", out)
    assert "other.ctx was made by other weights of 'tiny'" in out
    assert "full.ctx was made by the model 'tiny'" in out
    assert err == ""
    record = json.loads(figures.read_text())
    assert [each["fits"] for each in record["contexts"]] == [True, False, False]

    damaged = tmp_path / "damaged.ctx"
    damaged.write_bytes(book.read_bytes()[:-1] + b"x")
    assert main(["context", "show", str(damaged), str(book), str(tmp_path / "nowhere")]) == 2
    told = capsys.readouterr()
    assert "sea.ctx" in told.out  # the others are shown all the same
    assert "fits" not in told.out
    assert re.search(r"damaged\.ctx is damaged or cut off .* \(and 1 more\)\n$", told.err)


@pytest.mark.parametrize("columns", ["40", "80"])
def test_a_narrow_terminal(book: Path, capsys, monkeypatch, columns: str) -> None:
    monkeypatch.setenv("COLUMNS", columns)
    out, _ = run(capsys, "context", "show", book)
    assert max(map(len, out.splitlines())) <= int(columns)
    assert f"{len(TEXT.encode()):,}" in out


def test_mistakes_are_one_line(checkpoint: Path, book: Path, text: Path, capsys, tmp_path: Path) -> None:
    other = make(tmp_path / "other", seed=4)
    out = tmp_path / "a.ctx"
    assert "was made by other weights of 'tiny'" in error(capsys, "generate", other, "--context", book)
    assert "was made by other weights of 'tiny'" in error(capsys, "ask", other, "Who?", "--context", book)
    assert "was made by other weights of 'tiny'" in error(capsys, "chat", other, "--context", book)
    assert "made in float32/float32" in error(capsys, "ask", checkpoint, "Q", "--context", book, "--dtype", "bfloat16")
    assert "is a folder, and no context's file" in error(capsys, "generate", checkpoint, "--context", tmp_path)
    assert "does not exist" in error(capsys, "generate", checkpoint, "--context", tmp_path / "nowhere")
    assert "is no context" in error(capsys, "generate", checkpoint, "--context", text)
    save = ["context", "save", checkpoint, "--from", text, "--out"]
    assert "is no context: it would be lost" in error(capsys, *save, text)
    assert "is a folder: give a file in it" in error(capsys, *save, tmp_path)
    assert "is a file and no folder" in error(capsys, *save, text / "a.ctx")
    assert "is no line of at most 200 characters" in error(capsys, *save, out, "--title", "two\nlines")
    nothing = tmp_path / "empty.txt"
    nothing.touch()
    assert "empty.txt is empty" in error(capsys, "context", "save", checkpoint, "--from", nothing, "--out", out)
    nothing.write_bytes(b"\xff")
    assert "empty.txt is not UTF-8" in error(capsys, "context", "save", checkpoint, "--from", nothing, "--out", out)
    assert "No such file" in error(capsys, "context", "save", checkpoint, "--from", tmp_path / "no", "--out", out)
    assert "Missing --out" in error(capsys, "context", "save", checkpoint, "--from", text)
    assert "The question is empty" in error(capsys, "ask", checkpoint, " ")
    assert "Did you mean 'show'" in error(capsys, "context", "shwo")
    assert not out.exists()


def test_stopping_a_long_reading_leaves_nothing(checkpoint: Path, tmp_path: Path) -> None:
    """Ctrl-C, in a process of its own that reads a text without end."""
    out = tmp_path / "a.ctx"
    words = [sys.executable, "-m", "samba_lm", "context", "save", str(checkpoint), "--from", "-", "--out", str(out)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    with subprocess.Popen(words, stdin=subprocess.PIPE, stderr=subprocess.PIPE, env=environment) as process:
        assert process.stdin is not None
        assert process.stderr is not None
        for _ in range(64):  # more than a pipe holds: it is reading by now
            process.stdin.write(TEXT.encode())
        process.send_signal(2)
        process.stdin.close()
        assert process.stderr.read().decode() == "samba-lm: interrupted\n"
    assert process.returncode == 130
    assert list(tmp_path.iterdir()) == []


def test_the_page_about_contexts_runs(checkpoint: Path, tmp_path: Path) -> None:
    page = (Path(__file__).parents[2] / "docs" / "contexts.md").read_text(encoding="utf-8")
    (example,) = re.findall(r"```python\n(.*?)```", page, re.DOTALL)
    (session,) = re.findall(r"```sh\n(.*?)```", page, re.DOTALL)
    (tmp_path / "runs").mkdir()
    (tmp_path / "runs" / "first").symlink_to(checkpoint)
    done = subprocess.run([sys.executable, "-c", example], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    for name in ("book.txt", "sequel.txt"):
        (tmp_path / name).write_text(TEXT)
    words = "import sys, os\nfrom samba_lm.cli.main import main\nimport shlex\n"
    words += f"for line in {session.strip().splitlines()!r}:\n    assert main(shlex.split(line)[1:]) == 0, line\n"
    done = subprocess.run(
        [sys.executable, "-c", words],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
        stdin=subprocess.DEVNULL,
    )
    assert done.returncode == 0, done.stderr
    assert {"book.ctx", "both.ctx"} <= {path.name for path in tmp_path.iterdir()}
