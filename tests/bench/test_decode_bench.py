"""The benchmark of decoding, on the CPU with a tiny model."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from samba_lm.bench import ceilings, decode, gpu
from samba_lm.bench.bars import DECODE
from samba_lm.bench.ceilings import Ceilings
from samba_lm.bench.decode import BATCHES, CONTEXTS, check, least_bytes, run_decode
from samba_lm.bench.figure import Figure
from samba_lm.bench.steps import Steps
from samba_lm.bench.training import narrow, new_model
from samba_lm.checkpoint import place
from samba_lm.cli.main import main
from samba_lm.engine import fast_step
from samba_lm.engine.decoder import Decoder
from samba_lm.errors import UserError
from samba_lm.zoo import get

CPU = torch.device("cpu")
CEILINGS = Ceilings(copy=1e10, matmul=1e11)


def run(device: torch.device = CPU, quantized: str | None = None) -> list[Figure]:
    given = {"tokens": 300, "contexts": (256, 1024), "steps": 4, "quantized": quantized}
    return run_decode("samba-micro", CEILINGS, device, **given)[0]  # type: ignore[arg-type]


def test_everything_is_measured() -> None:
    figures = run()
    assert not any(figure.failed for figure in figures), figures
    names = "\n".join(figure.name for figure in figures)
    for batch in BATCHES:
        for how in ("greedy", "top-p 0.9"):
            assert f"batch {batch}, {how}, a step: GPU" in names
            assert f"batch {batch}, {how}, a step: token to token" in names
    for words in ("256 .. 1,024 tokens: spread", "the engine reads 300 tokens", "16 streams", "context of 300 tokens"):
        assert words in names
    assert sum(figure.name.endswith("file to first token") for figure in figures) == 2
    assert all(figure.value is not None and figure.value >= 0 for figure in figures)


@pytest.mark.parametrize("name", ["samba-1.7b", "llama3-1.6b", "mamba-1.8b"])
def test_steps_agree_with_the_definition(name: str) -> None:
    ours, plain = check(get(name), CPU)
    assert ours.value == pytest.approx(plain.value, rel=0.5)


@pytest.mark.parametrize("name", ["step", "again"])
def test_no_speed_without_parity(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    right = getattr(Decoder, name)

    def wrong(self, *args):  # type: ignore[no-untyped-def]
        drawn, logits = right(self, *args)
        return drawn, logits * 1.2

    monkeypatch.setattr(Decoder, name, wrong)
    (figure,) = run()
    assert figure.failed
    assert figure.note.startswith("parity: logits of steps: relative error")
    monkeypatch.setattr(Decoder, name, lambda self, *args: ((found := right(self, *args))[0] * 0, found[1]))
    (figure,) = run()
    assert "a token was drawn that is not the likeliest" in figure.note


def test_what_fails_leaves_the_rest(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*args: object) -> object:
        raise torch.OutOfMemoryError("no")
        yield

    monkeypatch.setattr(decode, "run_loading", broken)
    figures = run()
    assert [(f.name, f.note) for f in figures if f.failed] == [("samba-micro, a context's file", "out of memory")]
    assert len(figures) > 20


def test_texts_stand_where_they_are_said_to() -> None:
    texts = Steps(new_model(get("llama-micro"), CPU).eval(), 3)
    texts.fill(700)
    assert texts.slots.reserved == 700
    texts.both(2, 700, 5)
    assert texts.slots.reserved == 700  # no larger cache than such a text needs
    assert texts.slots.rows(0, 3).position.tolist() == [700, 700, 695]
    keys = texts.slots.rows(0, 3).layers[0]["k"]
    assert keys.std() == pytest.approx(1, abs=0.1)
    texts.clear()
    assert not keys.any()
    assert texts.slots.rows(0, 3).position.tolist() == [0, 0, 0]


def test_it_tells_which_steps_were_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    figures = run()
    notes = {figure.note for figure in figures if "a step: " in figure.name}
    assert notes == {"by model.step, not by the kernels for steps: no GPU that they run on"}
    monkeypatch.setattr(fast_step, "runs_on", lambda device: True)
    monkeypatch.setattr(fast_step, "why_not", lambda model: "")
    assert Steps(new_model(get("samba-micro"), CPU), 1).plain == ""


def test_quantised_weights_are_measured_without_the_bars_of_bf16() -> None:
    figures = run(quantized="int8")
    assert not [f.note for f in figures if f.failed]
    steps = [f for f in figures if "a step: " in f.name]
    assert steps
    assert all(f.name.startswith("samba-micro in int8, batch") and f.bar is None for f in steps)


def test_the_least_that_a_step_moves() -> None:
    moved = least_bytes(get("samba-1.7b"), 16, 131_072)
    assert moved / 3.0e12 == pytest.approx(1.32e-3, rel=0.05)  # the floor at 16 texts
    assert moved - least_bytes(get("samba-1.7b"), 16, 4096) == 0


def test_models_with_full_attention_are_refused() -> None:
    with pytest.raises(UserError, match="llama-micro has full attention"):
        run_decode("llama-micro", CEILINGS, CPU)


def test_bars_belong_to_what_is_measured() -> None:
    assert {batch for _, batch in DECODE} <= set(BATCHES)
    assert (CONTEXTS[0], CONTEXTS[-1]) == (4096, 1 << 20)


def test_the_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(gpu, "require_gpu", lambda command: CPU)
    monkeypatch.setattr(ceilings, "measure_ceilings", lambda clock: CEILINGS)
    file = tmp_path / "d.json"
    args = ["samba-micro", "--tokens", "100", "--contexts", "64", "256", "--steps", "2", "--profile"]
    assert main(["bench", "decode", *args, "--json", str(file)]) == 0
    record = json.loads(file.read_text())
    assert len(record["figures"]["decode"]) > 20
    assert record["kernels"]["samba-micro"]
    assert "batch 16, greedy, a step: GPU" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["samba-1.7"], "Did you mean 'samba-1.7b'"),
        (["llama3-1.6b"], "llama3-1.6b has full attention"),
        (["--contexts", "4096"], "--contexts must be two numbers or more, rising"),
        (["--contexts", "4096", "1024"], "--contexts must be two numbers or more, rising"),
        (["--steps", "1"], "--steps 1 must be from 2"),
    ],
)
def test_mistakes_are_one_line(words: list[str], told: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", "decode", *words]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert told in error


@pytest.mark.gpu
@pytest.mark.parametrize("name", ["samba-1.7b", "llama3-1.6b", "mistral-1.6b", "mamba-1.8b"])
def test_the_kernels_know_models_as_they_are_loaded(name: str) -> None:
    device = torch.device("cuda")
    assert not Steps(place(new_model(narrow(get(name)), device), device, torch.bfloat16).eval(), 1).plain


@pytest.mark.gpu
def test_on_the_gpu() -> None:
    figures = run(torch.device("cuda"))
    assert not any(figure.failed for figure in figures), [figure for figure in figures if figure.failed]
