"""Parts of the page that take long to measure: their files are written by the commands' own classes."""

from __future__ import annotations

import json
import math
import re
from pathlib import Path

import pytest
from html_page import check

from samba_lm.cli.eval_harness import HarnessResults
from samba_lm.cli.eval_summarize import SummaryResults
from samba_lm.cli.main import main
from samba_lm.eval.harness.run import Metric, Score
from samba_lm.eval.summaries import Summary
from samba_lm.study.record import Measured, Record

MODEL = {"checkpoint": "x", "weights_sha256": "a" * 64, "config": "c", "tokenizer": "t", "device": "cpu",
         "dtype": "float32", "quantized": None, "adapter_sha256": None}  # fmt: skip
SAMBA, LLAMA = {**MODEL, "name": "runs/samba"}, {**MODEL, "name": "runs/llama", "weights_sha256": "b" * 64}


@pytest.fixture(autouse=True)
def _here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def _page() -> str:
    assert main(["report", "."]) == 0
    text = Path("report.html").read_text(encoding="utf-8")
    check(text)
    return text


def _rows(text: str) -> list[list[str]]:
    """The cells of all tables, as text."""
    rows = re.findall(r"<tr>(.*?)</tr>", text, re.DOTALL)
    return [
        [re.sub(r"<[^>]+>", " ", cell).split() for cell in re.findall(r"<t[dh].*?</t[dh]>", row, re.DOTALL)]
        for row in rows
    ]


def _score(task: str, value: float, data: str, **more: object) -> Score:
    metrics = (
        Metric("acc", "none", value, 0.1, value - 0.1, value + 0.1),
        Metric("perplexity", "none", 9.5, None, None, None),
    )
    fields = {"documents": 20, "fewshot": 5, "version": "1", "parts": {}, "seconds": 1.0}
    return Score(**{"task": task, "metrics": metrics, "data_sha256": data, **fields, **more})


def test_downstream_tasks() -> None:
    results = HarnessResults(Path("h.json"), {"limit": 20, "seed": 1})
    results.add(SAMBA, _score("arc", 0.75, "d" * 64))
    results.add(SAMBA, _score("piqa", 0.5, "d" * 64))
    results.add(LLAMA, _score("arc", 0.25, "d" * 64))
    results.add(LLAMA, _score("piqa", 0.6, "e" * 64))
    results.save()
    text = _page()
    rows = _rows(text)
    assert ["arc", "acc,", "20", "documents,", "5", "shots"] in [row[0] for row in rows]
    arc = next(row for row in rows if row[0][:2] == ["arc", "acc,"])
    assert arc[1:] == [["75.0%", "65.0-85.0"], ["25.0%", "15.0-35.0"]]
    assert re.search(r'<td class="best">75.0%', text)
    # Of other data, a figure is in a row of its own, and neither is the best.
    piqa = [row[1:] for row in rows if row[0][:2] == ["piqa", "acc,"]]
    assert piqa == [[["50.0%", "40.0-60.0"], ["-"]], [["-"], ["60.0%", "50.0-70.0"]]]
    assert not re.search(r'class="best">[56]0.0%', text)
    assert "Only the first 20 documents of each task" in text


def test_summaries() -> None:
    results = SummaryResults(Path("s.json"), {"task": "squality", "max_tokens": 600})
    for i, scores in enumerate(((0.4, 0.2, 0.3), (0.2, 0.1, 0.1))):
        results.add(SAMBA, Summary(i, i, 100, 50, "stop", "x", *scores))
    results.add(LLAMA, Summary(0, 0, skipped="no room"))
    results.save()
    text = _page()
    samba, llama = (row for row in _rows(text) if row[0] in (["samba"], ["llama"]) and len(row) == 6)
    assert [cell[0] for cell in samba[1:]] == ["30.0", "15.0", "20.0", "2", "50"]
    assert [cell[0] for cell in llama[1:]] == ["-", "-", "-", "0", "-"]
    assert "<h3>SQuALITY</h3>" in text
    assert "Skipped, 1 of llama: no room." in text


def _found_again(step: int, folder: str, right: int, total: int, **facts: object) -> dict[str, object]:
    cell = {"size": 4096, "depth": 0.5, "right": right, "total": total, "control_right": None}
    cells = [{**cell, "skipped": "" if total else "no room"}]
    name = f"{folder}/step-{step:08}"
    return {**MODEL, "name": name, "checkpoint": name, "weights_sha256": name, **facts, "cells": cells}


def test_passkeys_over_the_steps() -> None:
    """Dtypes are lines of their own, what was skipped at every step stays a map, and strange names break nothing."""
    models = [
        *(_found_again(step, "runs/a", step, 5, dtype=dtype) for dtype in ("float32", "bfloat16") for step in (1, 2)),
        *(_found_again(step, "runs/full", 0, 0) for step in (1, 2)),
        *(_found_again(step, "runs/\x07\ud800", 3, 5) for step in (1, 2)),
    ]
    record = {"task": "passkey", "settings": {"trials": 5}, "settings_sha256": "c" * 64, "models": models}
    Path("p.json").write_text(json.dumps(record))
    text = _page()
    legend = re.findall(r"<li>.*?title=\"(.*?)\"", text)
    assert sorted(legend) == ["?? float32, 4K tokens", "a bfloat16, 4K tokens", "a float32, 4K tokens"]
    assert text.count('class="plot map"') == 2


def _metrics(folder: str, losses: list[float]) -> None:
    Path(folder).mkdir(parents=True)
    lines = [
        {"step": i, "tokens": 1000 * i, "loss": loss, "tokens_per_s": 50.0 * i}
        | ({"val_loss": loss + 1} if i == 3 else {})
        for i, loss in enumerate(losses, 1)
    ]
    Path(folder, "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))


def test_trainings(capsys: pytest.CaptureFixture[str]) -> None:
    _metrics("runs/a", [5.0, 4.0, 3.5])
    _metrics("runs/b", [6.0, math.nan, 4.5])
    Path("runs/a/step-00000003").mkdir()
    state = {"seconds": 90.0, "recipe": {"train": {"lr": 0.002, "batch_size": 4}, "model": {"name": "samba-tiny"}}}
    Path("runs/a/step-00000003/trainer.json").write_text(json.dumps(state))
    Path("runs/c").mkdir()
    Path("runs/c/metrics.jsonl").write_text('{"step": 1, "tokens": "many"}\n')
    Path("runs/d").mkdir()
    Path("runs/d/metrics.jsonl").write_text('nothing\n{"step": 2}\n')
    text = _page()
    assert _rows(text)[1:] == [
        [["a"], ["3"], ["3,000"], ["3.5000"], ["4.5000"], ["100"], ["1.5"]],
        [["b"], ["3"], ["3,000"], ["4.5000"], ["5.5000"], ["100"], ["-"]],
    ]
    assert "lr <code>0.002</code>" in text
    assert "model <code>samba-tiny</code>" in text
    told = " ".join(capsys.readouterr().err.split())
    assert "runs/c/metrics.jsonl is damaged" in told
    assert "runs/d/metrics.jsonl, line 1 is not a metrics record" in told


def test_of_rows_of_several_lengths_the_longest_are_shown() -> None:
    Path("runs/a").mkdir(parents=True)
    lines = [
        {"step": i, "tokens": 1000 * i, "loss": loss, "length": length}
        for i, (loss, length) in enumerate([(0.5, 256), (3.0, 512), (0.001, 256)], 1)
    ]
    Path("runs/a/metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert _rows(_page())[1][:4] == [["a"], ["3"], ["3,000"], ["3.0000"]]


def _record(run: str, stage: str, lr: float, seed: int, val_loss: float | None, **more: object) -> None:
    fields: dict[str, object] = {
        "fingerprint": "f", "status": "done", "recipe": {}, "config": {}, "parameters": 27_000_000,
        "flops_per_token": 1.0, "steps": 10, "tokens": 1_000_000, "seconds": 120.0, "tokens_per_s": 5000.0,
        "train_loss": 3.0, "curve": [(1, 5.0), (10, 3.0)], "device": "cpu", "started": "2026-11-22T07:00:00+00:00",
        "finished": "2026-11-22T07:02:00+00:00", "provenance": {"torch": "9.9"},
    }  # fmt: skip
    Record(run=run, stage=stage, lr=lr, seed=seed, val_loss=val_loss, **{**fields, **more}).write(Path("runs/small"))


def _evaluation(*losses: float) -> Measured:
    rest = {"windows": 4, "tokens": 4096, "positions": (1, 1024), "standard_error": 0.01, "means": [], "note": ""}
    rows = [{"length": 1024 * 2**i, "loss": loss, **rest} for i, loss in enumerate(losses)]
    return Measured(name="prefix", fingerprint="g", seconds=1.0, results=rows)


def test_texts_of_a_study_that_are_shown_each_by_itself() -> None:
    means = [math.log(40), math.log(900)]
    row = {"length": 1024, "loss": sum(means) / 2, "windows": 2, "tokens": 8, "positions": (1, 8), "note": ""}
    results = [{**row, "standard_error": 1.5, "means": means}]
    measured = Measured(name="stream", fingerprint="g", seconds=1.0, results=results)
    _record("samba", "final", 0.002, 0, 3.1, evaluations=[measured])
    told = {"evaluations": [{"name": "stream", "title": "Books", "apart": ["a <b>", "c"]}]}
    Path("runs/small/study.json").write_text(json.dumps({"format": "samba-lm study", "study": told}))
    text = _page()
    assert re.findall(r"<h4>(.*?)</h4>", text) == ["Books: a &lt;b&gt;", "Books: c"]
    rows = _rows(text)
    assert [["samba"], ["40.00"]] in rows
    assert [["samba"], ["900.0"]] in rows


def test_of_a_study_that_could_not_be_measured_no_empty_figure_is_drawn() -> None:
    """Losses that are not finite: the record holds none, of no window either."""
    row = {"length": 1024, "loss": None, "windows": 2, "tokens": 8, "positions": (1, 8), "note": "not finite"}
    results = [{**row, "standard_error": None, "means": []}]
    measured = [Measured(name=name, fingerprint="g", seconds=1.0, results=results) for name in ("prefix", "stream")]
    _record("samba", "final", 0.002, 0, 3.1, evaluations=measured)
    told = {"evaluations": [{"name": "stream", "apart": ["a", "c"]}]}
    Path("runs/small/study.json").write_text(json.dumps({"format": "samba-lm study", "study": told}))
    text = _page()
    assert re.findall(r"<h4>(.*?)</h4>", text) == ["prefix", "stream: a", "stream: c"]
    assert text.count("Nothing was measured here") == 3
    assert "Perplexity: lower is better" not in text


def test_a_study() -> None:
    for run, losses in (("samba", (3.5, 3.2)), ("llama", (3.4, 3.6))):
        for lr, loss in zip((0.001, 0.002), losses, strict=True):
            _record(run, "sweep", lr, 0, loss)
    _record("samba", "final", 0.002, 0, 3.1, evaluations=[_evaluation(math.log(20), math.log(18))])
    _record("samba", "final", 0.002, 1, 3.3, evaluations=[_evaluation(math.log(22), math.log(20))])
    _record("llama", "final", 0.001, 0, 3.3, evaluations=[_evaluation(math.log(21))])
    _record("mamba", "final", 0.004, 0, None, status="diverged", reason="the loss is not finite at step 3")
    _metrics("runs/small/samba/work", [1.0, 2.0, 3.0])  # the study's own: its record tells it already
    _record("gated", "final", 0.002, 0, 3.0)
    study = {
        "title": "Small <ones>",
        "evaluations": [{"name": "prefix", "title": "Held-out books"}],
        "runs": [
            {"name": "samba", "title": "Samba", "groups": ["Table 3", "Table 5"]},
            {"name": "llama", "title": "Llama-2", "groups": ["Table 3"]},
        ],
    }
    Path("runs/small/study.json").write_text(json.dumps({"format": "samba-lm study", "study": study}))
    text = _page()
    assert re.findall(r"<h2>(.*?)</h2>", text) == ["Small &lt;ones&gt;"]
    assert re.findall(r"<h3>(.*?)</h3>", text) == ["Table 3", "Table 5", "Others", "Learning rates"]
    assert text.count("<h4>Held-out books</h4>") == 2
    rows = _rows(text)
    assert [["Samba"], ["27.00M"], ["0.002"], ["2"], ["1.00M"], ["3.0000"], ["3.2000"], ["5,000"], ["2.0"]] in rows
    reach = 3.1824 * 0.01  # Student's t with 3 degrees of freedom
    ends = "-".join(f"{21 * math.exp(sign * reach):.2f}" for sign in (-1, 1))
    assert [["Samba"], ["20.98", "20.00-22.00", "2", "seeds"], ["18.97", "18.00-20.00", "2", "seeds"]] in rows
    assert [["Llama-2"], ["21.00", ends], ["-"]] in rows
    assert [["Samba"], ["3.5000"], ["3.2000"]] in rows
    assert re.search(r'<td class="best">3.2000</td>', text)
    assert "mamba, final, rate 0.004, seed 0: diverged. the loss is not finite at step 3" in text
    assert "from <code>2026-11-22 07:00 UTC</code>" in text
