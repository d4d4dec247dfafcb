"""`samba-lm eval entropy`: tables, files that a later run goes on from, and every mistake."""

from __future__ import annotations

import csv
import json
import lzma
import math
import signal
import threading
import time
from pathlib import Path

import pytest

from samba_lm.checkpoint import create, save
from samba_lm.cli.main import main
from samba_lm.config import Attention, GatedLinearAttention, LayerSpec, Mamba, ModelConfig, SwiGLU
from samba_lm.eval.intervals import mean_interval
from samba_lm.tokenizer import ByteTokenizer, train_bpe

SAMBA = (Mamba(state=4), SwiGLU(width=8), Attention(heads=2, window=16), SwiGLU(width=8))


def _save(folder: str, *layers: LayerSpec, seed: int = 0, tokenizer: bool = True) -> None:
    config = ModelConfig(name="tiny", d_model=16, vocab_size=257, layers=layers or SAMBA, max_context=50)
    save(create(config, seed=seed), Path(folder), ByteTokenizer() if tokenizer else None)


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The current folder, with a checkpoint and data of twelve rows, in a terminal of usual width."""
    monkeypatch.setenv("COLUMNS", "100")
    monkeypatch.chdir(tmp_path)
    _save("model")
    rows = [{"question": f"What is {i} and {i}?", "answer": f"It is {2 * i}. " + "So it is. " * i} for i in range(12)]
    with lzma.open("data.jsonl.xz", "wt") as file:
        file.write("".join(json.dumps(row) + "\n" for row in rows))
    return tmp_path


def _run(*words: str) -> int:
    return main(["eval", "entropy", *words, "--data=data.jsonl.xz", "--device=cpu"])


def _error(capsys: pytest.CaptureFixture[str]) -> str:
    err = capsys.readouterr().err
    assert err.startswith("samba-lm: error: ")
    assert err.count("\n") == 1, err
    return err


def _interrupt_when_there(path: Path) -> None:
    while not path.exists():
        time.sleep(0.01)
    signal.raise_signal(signal.SIGINT)


def _read(path: str) -> dict:
    return json.loads(Path(path).read_text())


def test_the_table_and_the_files_tell_the_same(capsys: pytest.CaptureFixture[str]) -> None:
    _save("gla", GatedLinearAttention(heads=2), Attention(heads=2, window=16))
    assert _run("model", "gla", "--samples=5", "--json=a.json", "--csv=a.csv", "--figure=a.png") == 0
    out = capsys.readouterr().out
    assert "model: entropy by block, 5 texts" in out
    assert "Left out, block 0: gla: linear attention" in out
    record = _read("a.json")
    assert record["task"] == "entropy"
    assert "Delta" in record["meaning"]
    model, gla = record["models"]
    assert [(block["block"], block["kind"]) for block in model["blocks"]] == [(0, "selection"), (1, "attention")]
    assert [(block["block"], block["kind"]) for block in gla["blocks"]] == [(1, "attention")]
    assert len(model["samples"]) == 5
    values = [sample["selection"]["0"] for sample in model["samples"]]
    mean = mean_interval([nats for nats, _ in values])
    block = model["blocks"][0]
    assert (block["samples"], block["nats"], block["low"], block["high"]) == (5, mean.mean, mean.low, mean.high)
    assert block["most"] == pytest.approx(sum(math.log(sample["tokens"]) for sample in model["samples"]) / 5)
    row = next(line for line in out.splitlines() if "selection" in line)
    assert [part.strip() for part in row.split("│")[2:4]] == [f"{mean.mean:.3f}", f"{mean.reach:.3f}"]
    rows = list(csv.DictReader(Path("a.csv").read_text().splitlines()))
    assert [(row["checkpoint"], row["block"], row["kind"]) for row in rows] == [
        ("model", "0", "selection"), ("model", "1", "attention"), ("gla", "1", "attention")
    ]  # fmt: skip
    assert float(rows[0]["share"]) == pytest.approx(block["share"])
    assert Path("a.png").read_bytes().startswith(b"\x89PNG")


def test_different_tokens_are_told(capsys: pytest.CaptureFixture[str]) -> None:
    config = ModelConfig(name="tiny", d_model=16, vocab_size=300, layers=SAMBA)
    texts = ["What is it and why? It is so because it is so. " * 9]
    save(create(config, seed=0), Path("words"), train_bpe(texts, 300))
    assert _run("model", "words", "--samples=2") == 0
    assert "different tokens" in " ".join(capsys.readouterr().out.split())
    assert _run("model", "--samples=2") == 0
    assert "different tokens" not in capsys.readouterr().out


def test_a_later_run_goes_on(capsys: pytest.CaptureFixture[str]) -> None:
    assert _run("model", "--samples=4", "--json=a.json") == 0
    before = _read("a.json")["models"][0]
    _save("other", seed=1)
    assert _run("other", "model", "--samples=99", "--json=a.json") == 0
    assert "4 of the texts were read before." in capsys.readouterr().out
    first, second = _read("a.json")["models"]
    assert [sample["row"] for sample in first["samples"]] == list(range(12))
    assert [sample for sample in first["samples"] if sample in before["samples"]] == before["samples"]
    assert first["samples"] != second["samples"]
    assert _run("model", "--samples=4", "--json=b.json") == 0
    assert _read("b.json")["models"][0]["blocks"] == before["blocks"]


def test_what_one_text_cannot_tell_is_a_dash(capsys: pytest.CaptureFixture[str]) -> None:
    assert _run("model", "--samples=1") == 0
    rows = [line.split("│") for line in capsys.readouterr().out.splitlines() if "attention" in line]
    assert [cells[3].strip() + cells[5].strip() for cells in rows] == ["--"]


def test_other_settings_and_other_files_are_refused(capsys: pytest.CaptureFixture[str]) -> None:
    assert _run("model", "--samples=2", "--json=a.json") == 0
    assert _run("model", "--samples=2", "--seed=1", "--json=a.json") == 2
    assert "a.json holds results with seed = 0, not 1" in _error(capsys)
    for text in ("{}", '{"task": "passkey"}', '{"task": "entropy", "settings_sha256": 3}', "["):
        Path("a.json").write_text(text)
        assert _run("model", "--json=a.json") == 2
        assert "a.json" in _error(capsys)
        assert Path("a.json").read_text() == text


def test_an_interrupted_run_keeps_what_is_finished(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("samba_lm.cli.results.SAVE_EVERY", 0.0)
    row = json.dumps({"question": "How many?", "answer": "Many. " * 2000})
    Path("long.jsonl").write_text(f"{row}\n" * 500)
    thread = threading.Thread(target=_interrupt_when_there, args=(Path("a.json"),))
    thread.start()
    command = ["eval", "entropy", "model", "--data=long.jsonl", "--device=cpu", "--samples=500", "--json=a.json"]
    try:
        assert main(command) == 130
    finally:
        thread.join()
    told = capsys.readouterr()
    assert "The same command goes on." in told.out
    assert told.err == "samba-lm: interrupted\n"
    assert 0 < len(_read("a.json")["models"][0]["samples"]) < 500


def test_texts_beyond_full_attention_are_marked(capsys: pytest.CaptureFixture[str]) -> None:
    _save("full", Attention(heads=2))
    assert _run("full", "--json=a.json") == 0
    told = " ".join(capsys.readouterr().out.split())
    assert "hold more tokens than max_context = 50" in told
    samples = _read("a.json")["models"][0]["samples"]
    assert [bool(sample["skipped"]) for sample in samples] == [sample["tokens"] > 50 for sample in samples]
    assert 0 < _read("a.json")["models"][0]["blocks"][0]["samples"] < 12


@pytest.mark.parametrize("columns", [40, 60, 100])
def test_narrow_terminals(columns: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv("COLUMNS", str(columns))
    assert _run("model", "--samples=2", "--figure=a.png") == 0
    assert max(map(len, capsys.readouterr().out.splitlines())) <= columns


def test_a_model_that_neither_attends_nor_selects(capsys: pytest.CaptureFixture[str]) -> None:
    _save("mlp", SwiGLU(width=8))
    assert _run("mlp", "--json=a.json", "--csv=a.csv", "--figure=a.png") == 0
    assert "No layer of mlp attends or selects" in capsys.readouterr().out
    assert _read("a.json")["models"][0]["blocks"] == []


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ([], "Which checkpoint?"),
        (["nothing"], "nothing"),
        (["mute"], "mute has no tokenizer"),
        (["model", "--samples=0"], "--samples is 0"),
        (["model", "--seed=-1"], "--seed is -1"),
        (["model", "--question=q"], "has no field 'q'. Known: answer, question."),
        (["model", "--data=absent.jsonl"], "There is no file absent.jsonl"),
        (["model", "--data=model"], "model is a folder"),
        (["model", "--data=empty.jsonl"], "empty.jsonl has no rows"),
        (["model", "--data=broken.jsonl"], "broken.jsonl line 2 is not valid JSON"),
        (["model", "--data=list.jsonl"], "list.jsonl line 1 is not a JSON object"),
        (["model", "--data=number.jsonl"], "field 'question' is 3, not a text"),
        (["model", "--data=torn.jsonl.xz"], "torn.jsonl.xz is not a whole .xz file"),
        (["model", "--figure=."], "--figure . is a folder"),
    ],
)
def test_mistakes(options: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    _save("mute", tokenizer=False)
    Path("empty.jsonl").write_text("\n\n")
    Path("broken.jsonl").write_text('{"question": "a", "answer": "b"}\n{')
    Path("list.jsonl").write_text("[1]\n")
    Path("number.jsonl").write_text('{"question": 3, "answer": "b"}\n')
    Path("torn.jsonl.xz").write_bytes(Path("data.jsonl.xz").read_bytes()[:-20])
    data = [] if any(option.startswith("--data") for option in options) else ["--data=data.jsonl.xz"]
    assert main(["eval", "entropy", *options, *data, "--device=cpu"]) == 2
    assert message in _error(capsys)
