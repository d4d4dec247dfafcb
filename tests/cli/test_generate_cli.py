"""``samba-lm generate`` and ``samba-lm chat`` as a person runs them."""

from __future__ import annotations

import io
import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import samba_lm
from samba_lm.cli.generate import file_share
from samba_lm.cli.main import main
from samba_lm.cli.model import SMALL, with_one_thread
from samba_lm.config import Attention, Mamba, ModelConfig, SwiGLU
from samba_lm.tokenizer import ByteTokenizer, train_bpe

GREEDY = ["--temperature", "0", "--max-tokens", "40", "--no-stop-at-eos"]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    layers = (Mamba(), SwiGLU(width=48), Attention(heads=2, window=24), SwiGLU(width=48))
    config = ModelConfig(name="tiny", d_model=32, vocab_size=257, layers=layers, tie_embeddings=False)
    model = samba_lm.create(config, seed=3)
    assert model.unembedding is not None
    with torch.no_grad():
        model.unembedding.mul_(20)
        model.unembedding[128:] = 0  # mostly plain letters
    folder = tmp_path_factory.mktemp("generate") / "checkpoint"
    samba_lm.save(model, folder, ByteTokenizer())
    return folder


@pytest.fixture
def stdin(monkeypatch: pytest.MonkeyPatch):
    def give(data: bytes) -> None:
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(data), encoding="utf-8"))

    return give


def test_the_text_goes_to_stdout_and_its_cost_to_stderr(checkpoint: Path, capsys, tmp_path: Path) -> None:
    record = tmp_path / "figures.json"
    assert main(["generate", str(checkpoint), "--prompt", "Hello", *GREEDY, "--json", str(record)]) == 0
    out, err = capsys.readouterr()
    model, tokenizer = samba_lm.load(checkpoint)
    assert out == samba_lm.generate(model, tokenizer, "Hello", temperature=0, max_tokens=40, stop_at_eos=False) + "\n"
    assert re.fullmatch(
        r"read 5 tokens in [\d.]+ s \([\d,]+ tokens/s\), made 40 in [\d.]+ s \([\d,.]+ tokens/s\), "
        r"peak memory [\d,]+ MiB, ended by: length\n",
        err,
    )
    figures = json.loads(record.read_text())
    assert (figures["device"], figures["dtype"]) == ("cpu", "float32"), "what it ran in, though nothing was asked"
    assert (figures["prompt_tokens"], figures["new_tokens"], figures["finish"]) == (5, 40, "length")
    assert figures["sampling"]["temperature"] == 0
    assert figures["decode_tokens_per_second"] > 0
    assert figures["peak_memory_bytes"] > 10e6


def test_the_prompt_may_come_from_a_file_or_from_stdin(checkpoint: Path, capsys, tmp_path: Path, stdin) -> None:
    text = "A line of a long prompt: é😀.\n" * 4500  # several pieces
    file = tmp_path / "prompt.txt"
    file.write_text(text, encoding="utf-8")
    outputs = []
    for source in (["--prompt", text], [text], ["--prompt-file", str(file)], ["--prompt-file", "-"], ["-"]):
        stdin(text.encode())
        assert main(["generate", str(checkpoint), *source, *GREEDY]) == 0
        outputs.append(capsys.readouterr().out)
    assert len(set(outputs)) == 1


def test_sampling_options_reach_the_sampler(checkpoint: Path, capsys) -> None:
    def run(*options: str) -> str:
        assert main(["generate", str(checkpoint), "--prompt", "a", "--max-tokens", "60", *options]) == 0
        return capsys.readouterr().out

    base = run()
    assert run() == base
    for options in (
        ["--seed", "1"],
        ["--temperature", "0.5"],
        ["--top-k", "2"],
        ["--top-p", "0.5"],
        ["--min-p", "0.3"],
    ):
        assert run(*options) != base, options
    assert run("--repetition-penalty", "5") != base
    letters = sorted(set(base.rstrip("\n")), key=base.index)
    first = min(base.index(letters[2]), base.index(letters[4]))
    assert run("--stop", letters[2], "--stop", letters[4]) == base[:first] + "\n"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--top-p", "1.5"], "top_p=1.5 is out of range"),
        (["--max-tokens", "some"], "--max-tokens"),
        (
            ["--max-tokens", "-1"],
            "max_tokens=-1 is out of range: it must be a whole number from 0 on, or None (in a comm",
        ),
        (["--temprature", "1"], "--temperature"),
        (["--prompt", "a", "--prompt-file", "f"], "--prompt and --prompt-file were both given"),
        (["--prompt", "a", "-"], "- and --prompt were both given"),
        (["Once upon a time", "--prompt", "a"], "PROMPT and --prompt were both given"),
        (["Once", "upon"], "Unexpected argument 'upon'"),
        (["--prompt-file", "no/such/file"], "no/such/file"),
        (["--device", "tpu"], "'tpu'"),
        (["--chunk", "0"], "chunk=0"),
    ],
)
def test_mistakes_are_one_line(checkpoint: Path, capsys, options: list[str], message: str) -> None:
    assert main(["generate", str(checkpoint), *options]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("samba-lm: error: ")
    assert err.count("\n") == 1
    assert message in err


def test_files_that_cannot_be_read_are_told(checkpoint: Path, capsys, tmp_path: Path) -> None:
    file = tmp_path / "latin.txt"
    file.write_bytes(b"caf\xe9 au lait")
    assert main(["generate", str(checkpoint), "--prompt-file", str(file)]) == 2
    assert "latin.txt is not UTF-8: byte 3 " in capsys.readouterr().err
    assert main(["generate", str(tmp_path), "--prompt", "a"]) == 2
    assert "is not a checkpoint" in capsys.readouterr().err


@pytest.mark.parametrize(("parameters", "threads"), [(SMALL - 1, [2, 1, 1]), (SMALL, [2, 2, 2])])
def test_a_small_model_writes_with_one_thread_and_reads_with_all(
    parameters: int, threads: list[int], checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, _ = samba_lm.load(checkpoint)
    monkeypatch.setattr(ModelConfig, "parameters", lambda self: parameters)
    torch.set_num_threads(2)
    try:
        seen = [int(piece) for piece in with_one_thread((str(torch.get_num_threads()) for _ in range(3)), model)]
        assert seen == threads
        assert torch.get_num_threads() == 2, "as it was"
        left = with_one_thread(iter("abc"), model)
        assert next(left) + next(left) == "ab"
        del left  # an answer that was stopped
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(1)


def test_full_attention_takes_a_limit(capsys, tmp_path: Path) -> None:
    layers = (Attention(heads=2), SwiGLU(width=32))
    model = samba_lm.create(ModelConfig(name="full", d_model=32, vocab_size=257, layers=layers))
    samba_lm.save(model, tmp_path / "full", ByteTokenizer())
    for command in (["generate", str(tmp_path / "full")], ["ask", str(tmp_path / "full"), "who?"]):
        assert main([*command, "--max-tokens", "unlimited"]) == 2
        out, err = capsys.readouterr()
        assert out == ""
        assert "full has full attention" in err
        assert main([*command, "--max-tokens", "3"]) == 0
        capsys.readouterr()


def test_a_checkpoint_without_a_tokenizer_is_told(capsys, tmp_path: Path) -> None:
    config = ModelConfig(name="bare", d_model=16, vocab_size=300, layers=(SwiGLU(width=16),))
    samba_lm.save(samba_lm.create(config), tmp_path / "bare", None)
    assert main(["generate", str(tmp_path / "bare"), "--prompt", "a"]) == 2
    assert "has no tokenizer" in capsys.readouterr().err


def test_a_bpe_checkpoint_reads_a_file_as_it_reads_its_text(capsys, tmp_path: Path) -> None:
    text = "the sea is salt, the tears are salt\n" * 4000
    bpe = train_bpe([text[:400]], 300)
    config = ModelConfig(name="bpe", d_model=16, vocab_size=300, layers=(Mamba(), SwiGLU(width=16)))
    samba_lm.save(samba_lm.create(config), tmp_path / "bpe", bpe)
    (tmp_path / "prompt.txt").write_text(text)
    assert main(["generate", str(tmp_path / "bpe"), "--prompt-file", str(tmp_path / "prompt.txt"), *GREEDY]) == 0
    assert f"read {bpe.encode(text).size:,} tokens" in capsys.readouterr().err


def start(*argv: str) -> subprocess.Popen[bytes]:
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1"}
    command = [sys.executable, "-m", "samba_lm", *argv]
    pipe = subprocess.PIPE
    return subprocess.Popen(command, stdin=pipe, stdout=pipe, stderr=pipe, env=environment)


def test_ctrl_c_ends_an_unlimited_text_with_its_cost(checkpoint: Path) -> None:
    unlimited = ["--prompt", "a", "--max-tokens", "unlimited", "--no-stop-at-eos"]
    with start("generate", str(checkpoint), *unlimited) as process:
        assert process.stdout is not None
        assert len(process.stdout.read(500)) == 500
        process.send_signal(signal.SIGINT)
        _, err = process.communicate(timeout=60)
    assert process.returncode == 130
    assert b"ended by: interrupted\nsamba-lm: interrupted\n" in err
    assert b"Traceback" not in err


def test_ctrl_c_stops_an_answer_but_not_the_chat(checkpoint: Path, tmp_path: Path) -> None:
    talk = tmp_path / "talk.txt"
    with start("chat", str(checkpoint), "--max-tokens", "unlimited", "--no-stop-at-eos") as process:
        assert process.stdin is not None
        assert process.stdout is not None
        process.stdin.write(b"hi\n")
        process.stdin.flush()
        process.stdout.read(500)
        process.send_signal(signal.SIGINT)
        _, err = process.communicate(f"/save {talk}\n/quit\n".encode(), timeout=60)
    assert process.returncode == 0, err
    assert talk.read_text().startswith("User: hi\nAssistant:")
    assert len(talk.read_text()) >= 400


def test_chat_answers_and_obeys_its_commands(checkpoint: Path, capsys, stdin, tmp_path: Path) -> None:
    talk = tmp_path / "talk.txt"
    lines = ["hello", "", "and?", f"/save {talk}", "/save", "/sav", "/help", "/reset", f"/save {talk}2", "again"]
    stdin("\n".join(lines).encode())  # the end of the file leaves, as Ctrl-D does
    assert main(["chat", str(checkpoint), "--system", "Be kind.", "--max-tokens", "10"]) == 0
    out = capsys.readouterr().out
    assert re.match(r"Be kind\.\n\nUser: hello\nAssistant:.*\nUser: and\?\nAssistant:", talk.read_text(), re.DOTALL)
    assert Path(f"{talk}2").read_text() == ""
    assert "/save needs a file" in out
    assert "/sav is not a command. Did you mean '/save'?" in out
    assert "/reset " in out


def test_an_untrained_model_is_announced(checkpoint: Path, capsys) -> None:
    assert main(["generate", "samba-micro", "--max-tokens", "1"]) == 0
    assert "samba-micro is untrained: its weights are random" in capsys.readouterr().err
    assert main(["generate", str(checkpoint), "--max-tokens", "1"]) == 0
    assert "untrained" not in capsys.readouterr().err


def test_the_progress_tells_how_much_of_a_file_was_read(tmp_path: Path) -> None:
    (tmp_path / "long.txt").write_bytes(b"a" * 2_000_000)
    with (tmp_path / "long.txt").open("rb") as file:
        file.read(500_000)
        assert file_share(file) == ", 25% of 2.00MB"
    assert file_share(None) == ""
