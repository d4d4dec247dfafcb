"""`samba-lm eval summarize`: tables, files that a later run goes on from, and every mistake."""

from __future__ import annotations

import csv
import json
import lzma
import signal
import threading
import time
from pathlib import Path

import pytest

from samba_lm.checkpoint import create, save
from samba_lm.cli.main import main
from samba_lm.config import Attention, LayerSpec, Mamba, ModelConfig
from samba_lm.tokenizer import ByteTokenizer


def _save(folder: str, *layers: LayerSpec, seed: int = 0) -> None:
    layers = layers or (Mamba(state=4), Attention(heads=2, window=16))
    config = ModelConfig(name="tiny", d_model=16, vocab_size=257, layers=layers, max_context=150)
    save(create(config, seed=seed), Path(folder), ByteTokenizer())


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The current folder, with a checkpoint and data of three reports and of two stories, packed."""
    monkeypatch.setenv("COLUMNS", "100")
    monkeypatch.chdir(tmp_path)
    _save("model")
    Path("data/govreport").mkdir(parents=True)
    reports = [{"input": "It is so. " * (8 * i + 1), "outputs": ["It is so."]} for i in range(3)]
    Path("data/govreport/leval_gov_report_summ.jsonl").write_text("".join(json.dumps(r) + "\n" for r in reports))
    Path("data/squality").mkdir()
    asked = [{"question_text": f"Who {i}?", "responses": [{"response_text": "One."}]} for i in range(2)]
    with lzma.open("data/squality/test.jsonl.xz", "wt") as file:
        file.write((json.dumps({"document": "A story.", "questions": asked}) + "\n") * 2)
    return tmp_path


def _run(*words: str, task: str = "govreport") -> int:
    words = (*words, f"--task={task}", *([] if "--data-dir=." in words else ["--data-dir=data"]), "--device=cpu")
    return main(["eval", "summarize", *words])


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
    _save("other", seed=1)
    assert _run("model", "other", "--max-tokens=20", "--json=a.json", "--csv=a.csv", task="squality") == 0
    out = capsys.readouterr().out
    assert "model: squality, 4 summaries of 2 texts" in out
    assert "By rouge-score 0." in out
    record = _read("a.json")
    assert record["task"] == "summarize"
    assert record["settings"]["prompt"] == "{text}\n\nQuestion: {question}\nAnswer:"
    assert (record["settings"]["task"], record["settings"]["split"]) == ("squality", "test")
    first, second = record["models"]
    assert [(sample["number"], sample["document"]) for sample in first["samples"]] == [(0, 0), (1, 0), (2, 1), (3, 1)]
    assert all(sample["new_tokens"] == 20 and sample["finish"] == "length" for sample in first["samples"])
    assert first["samples"] != second["samples"]
    scores = first["scores"]["rougeL"]
    assert scores["mean"] == pytest.approx(sum(sample["rougeL"] for sample in first["samples"]) / 4)
    rows = list(csv.DictReader(Path("a.csv").read_text().splitlines()))
    assert [row["checkpoint"] for row in rows] == ["model", "other"]
    assert float(rows[0]["rougeL"]) == scores["mean"]
    assert f"ROUGE-L │ {100 * scores['mean']:>4.1f}" in out


def test_a_later_run_goes_on(capsys: pytest.CaptureFixture[str]) -> None:
    command = ["model", "--max-tokens=10", "--json=a.json"]
    assert _run(*command, "--limit=1") == 0
    before = _read("a.json")["models"][0]["samples"]
    assert _run(*command) == 0
    assert "1 of them were written before." in capsys.readouterr().out
    (model,) = _read("a.json")["models"]
    assert len(model["samples"]) == 3
    assert model["samples"][:1] == before
    assert _run(*command) == 0
    assert "3 of them were written before." in capsys.readouterr().out
    assert _run("model", "--max-tokens=11", "--json=a.json") == 2
    assert "a.json holds results with max_tokens = 10, not 11" in _error(capsys)


def test_an_interrupted_run_keeps_what_is_finished(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("samba_lm.cli.results.SAVE_EVERY", 0.0)
    Path("govreport").mkdir()
    row = json.dumps({"input": "It is so. " * 20, "outputs": ["So."]})
    Path("govreport/leval_gov_report_summ.jsonl").write_text(f"{row}\n" * 5000)
    thread = threading.Thread(target=_interrupt_when_there, args=(Path("a.json"),))
    thread.start()
    try:
        assert _run("model", "--data-dir=.", "--max-tokens=8", "--json=a.json") == 130
    finally:
        thread.join()
    told = capsys.readouterr()
    assert "The same command goes on." in told.out
    assert told.err == "samba-lm: interrupted\n"
    assert 0 < len(_read("a.json")["models"][0]["samples"]) < 5000


@pytest.mark.parametrize("columns", [40, 60, 100])
def test_texts_beyond_full_attention_are_marked(
    columns: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("COLUMNS", str(columns))
    _save("full", Attention(heads=2))
    assert _run("full", "--max-tokens=10", "--json=a.json", "--csv=a.csv") == 0
    out = capsys.readouterr().out
    assert max(map(len, out.splitlines())) <= columns
    assert "Skipped, 1 question: full attention would have to hold more tokens than max_context = 150." in " ".join(
        out.split()
    )
    assert [bool(sample["skipped"]) for sample in _read("a.json")["models"][0]["samples"]] == [False, False, True]
    assert next(csv.DictReader(Path("a.csv").read_text().splitlines()))["samples"] == "2"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ([], "Which checkpoint?"),
        (["nothing"], "nothing"),
        (["model", "--limit=0"], "--limit is 0"),
        (["model", "--max-tokens=-1"], "--max-tokens is -1"),
        (["model", "--split=dev"], "govreport has no split 'dev'. Known: test"),
        (["model", "--data-dir=."], "The data of govreport is not in .: put https://"),
        (["model", "--csv=."], "--csv . is a folder"),
        (["model", "--json=a.json", "--csv=a.json"], "--json and --csv are both a.json"),
        (["model", "--task=qmsun"], "Did you mean 'qmsum'"),
        (["model", "--data-dir=broken"], "line 1 has no field 'outputs'"),
    ],
)
def test_mistakes(options: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    Path("broken").mkdir()
    Path("broken/leval_gov_report_summ.jsonl").write_text('{"input": "x"}\n')
    words = [] if any(option.startswith("--data-dir") for option in options) else ["--data-dir=data"]
    words += [] if any(option.startswith("--task") for option in options) else ["--task=govreport"]
    assert main(["eval", "summarize", *options, *words, "--device=cpu"]) == 2
    assert message in _error(capsys)
