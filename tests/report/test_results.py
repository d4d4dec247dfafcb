"""`samba-lm report`: real results of real commands on one page, and folders that hold something else."""

from __future__ import annotations

import json
import re
import shutil
import sys
from pathlib import Path

import pytest
from html_page import check

import samba_lm
from samba_lm.cli.main import main
from samba_lm.config import Attention, Mamba, ModelConfig
from samba_lm.report.models import key, name_models, shortest
from samba_lm.report.part import number
from samba_lm.tokenizer import ByteTokenizer

NASTY = "<img src=x onerror=alert(1)>"


def _save(folder: Path, seed: int) -> None:
    layers = (Mamba(state=4), Attention(heads=2, window=16))
    config = ModelConfig(name="tiny", d_model=16, vocab_size=257, layers=layers)
    samba_lm.save(samba_lm.create(config, seed=seed), folder, ByteTokenizer())


def _run(*words: str) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["samba-lm", *words])  # which the files tell
        assert main([*words]) == 0, words


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What the commands wrote of two models, one of which has an unkind name."""
    folder = tmp_path_factory.mktemp("made")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        _save(folder / "models" / "first", 0)
        _save(folder / "models" / NASTY, 1)
        models = ["models/first", f"models/{NASTY}"]
        Path("names.txt").write_text("".join(f"Person {a}{b}\n" for a in "ABCDE" for b in "ABCDE"))
        Path("text.txt").write_text("The window slides and the state remains. " * 100)
        Path("rows.jsonl").write_text('{"question": "How many?", "answer": "It is 3."}\n' * 3)
        small = ["--lengths=300,400", "--depths=3", "--keys=2", "--device=cpu"]
        _run("eval", "passkey", *models, *small, "--json=out/key.json")
        _run("eval", "phonebook", models[0], "--pairs=5,9", "--prompts=2", "--names=names.txt", "--control",
             "--json=out/book.json")  # fmt: skip
        ppl = ["--data=text.txt", "--lengths=64,128"]
        _run("eval", "perplexity", *models, *ppl, "--json=out/ppl/a.json")
        _run("eval", "perplexity", models[0], *ppl, "--protocol=stream", "--json=out/ppl/b.json")
        _run("eval", "entropy", *models, "--data=rows.jsonl", "--json=out/entropy.json")
    return folder


@pytest.fixture
def out(made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of these results; the folder above is the current one."""
    shutil.copytree(made / "out", tmp_path / "out")
    monkeypatch.chdir(tmp_path)
    return tmp_path / "out"


def _keep(out: Path, *names: str) -> None:
    """Leave only these results, so that the page is quickly made."""
    for path in out.rglob("*.json"):
        if path.relative_to(out).as_posix() not in names:
            path.unlink()


def _text(path: str = "out/report.html") -> str:
    return Path(path).read_text(encoding="utf-8")


def _section(name: str) -> str:
    return re.search(rf'<section id="{name}">(.*?)</section>', _text(), re.DOTALL)[1]


def test_the_page_of_real_results(out: Path, capsys: pytest.CaptureFixture[str]) -> None:
    _run("report", "out")
    told = capsys.readouterr()
    assert told.out == "out/report.html\n"
    assert told.err == ""
    reader = check(_text())
    headings = re.findall(r"<h2>(.*?)</h2>", _text())
    assert headings == ["Models", "Perplexity", "Passkey", "Phonebook", "Entropy"]
    assert not any(name == "img" for name, _ in reader.seen), "a model's name is text"
    assert NASTY in reader.text
    # Every command is there to copy.
    for name in ("key", "book", "ppl/a", "ppl/b", "entropy"):
        record = json.loads((out / f"{name}.json").read_text())
        assert record["commit"][:12] in reader.text if "commit" in record else True
        assert f"--json=out/{name}.json" in reader.text
    # The figures are those of the files.
    rows = json.loads((out / "ppl" / "a.json").read_text())["models"][0]["results"]
    for row in rows:
        value, low, high = (number(row[name]) for name in ("perplexity", "low", "high"))
        assert value in _section("perplexity")
        assert f"{low}-{high}" in _section("perplexity")
    assert "Control, asked with the state set to zero: never right." in _section("phonebook")
    assert _section("passkey").count('class="plot map"') == 2
    # Two protocols are two tables, each with its settings.
    assert len(re.findall(r"<table>", _section("perplexity"))) == 2
    assert "<code>stream</code>" in _section("perplexity")
    # A model keeps its line in all parts.
    first = {re.search(r'c\d-stroke"[^>]*></path>.*?first', _section(part))[0][:9] for part in ("phonebook", "entropy")}
    assert len(first) == 1


def test_the_page_can_be_written_elsewhere_and_is_no_result_itself(out: Path) -> None:
    _keep(out, "key.json")
    _run("report", "out", "--out", "pages/page.html")
    assert not (out / "report.html").exists()
    before = _text("pages/page.html")
    _run("report", "out", "--out", "out/page.html")
    assert re.sub(r"\d\d:\d\d UTC", "", _text("out/page.html")) == re.sub(r"\d\d:\d\d UTC", "", before)


def test_files_with_the_same_settings_are_one_table(out: Path) -> None:
    _keep(out, "key.json")
    record = json.loads((out / "key.json").read_text())
    first, second = record["models"]
    (out / "key.json").write_text(json.dumps(record | {"models": [first]}))
    (out / "more.json").write_text(json.dumps(record | {"models": [second]}))
    (out / "other.json").write_text(json.dumps(record | {"settings_sha256": "0" * 64, "models": [second]}))
    _run("report", "out")
    tables = re.findall(r"<table>(.*?)</table>", _section("passkey"), re.DOTALL)
    assert [table.count("<tr>") - 1 for table in tables] == [2, 1]


def test_a_model_measured_twice_stands_once_as_it_was_measured_last(out: Path) -> None:
    _keep(out, "ppl/a.json")
    record = json.loads((out / "ppl" / "a.json").read_text())
    for row in record["models"][0]["results"]:
        row["perplexity"] = 4321.7
    (out / "a-later.json").write_text(json.dumps(record | {"time": "2999-01-01T00:00:00+00:00"}))
    (out / "b-earlier.json").write_text(json.dumps(record | {"time": "1999-01-01T00:00:00+00:00"}))
    _run("report", "out")
    assert _section("perplexity").count("4,322") == len(record["models"][0]["results"])


@pytest.mark.parametrize(("name", "items", "size"), [("key", "cells", "size"), ("ppl/a", "results", "length")])
def test_what_two_files_measured_of_a_model_stands_together(out: Path, name: str, items: str, size: str) -> None:
    """And what the later one skipped does not hide what the earlier one measured."""
    _keep(out, f"{name}.json")
    _run("report", "out")
    part = "passkey" if name == "key" else "perplexity"
    before = re.findall(r"<table>(.*?)</table>", _section(part), re.DOTALL)
    record = json.loads((out / f"{name}.json").read_text())
    longest = max(row[size] for row in record["models"][0][items])
    earlier, later = ([dict(model) for model in record["models"]] for _ in range(2))
    for old, new in zip(earlier, later, strict=True):
        old[items] = [row for row in old[items] if row[size] == longest]
        gone = [row | {"skipped": "no room", "total": 0, "right": 0, "tokens": 0} for row in old[items]]
        new[items] = [row for row in new[items] if row[size] != longest] + gone
    (out / f"{name}.json").write_text(json.dumps(record | {"time": "1999-01-01T00:00:00+00:00", "models": earlier}))
    (out / "more.json").write_text(json.dumps(record | {"models": later}))
    _run("report", "out")
    assert re.findall(r"<table>(.*?)</table>", _section(part), re.DOTALL) == before


def test_models_with_different_tokenizers_are_compared_by_bits(out: Path) -> None:
    _keep(out, "ppl/a.json")
    record = json.loads((out / "ppl" / "a.json").read_text())
    record["models"][1]["tokenizer"] = "0" * 64
    (out / "ppl" / "a.json").write_text(json.dumps(record))
    _run("report", "out")
    bits = record["models"][0]["results"][0]["bits_per_byte"]
    assert "different tokenizers" in _section("perplexity")
    assert f"{bits:.4f}" in _section("perplexity")


def test_what_was_skipped_says_why(out: Path) -> None:
    _keep(out, "key.json", "ppl/a.json")
    for name, items, size in (("key", "cells", "size"), ("ppl/a", "results", "length")):
        record = json.loads((out / f"{name}.json").read_text())
        row = record["models"][0][items][-1]
        row |= {
            "skipped": f"no room for {NASTY}",
            "total": 0,
            "right": 0,
            "perplexity": None,
            "low": None,
            "high": None,
        }
        (out / f"{name}.json").write_text(json.dumps(record))
        assert row[size] in (400, 128)
    _run("report", "out")
    reader = check(_text())
    assert f"Skipped, first at 400: no room for {NASTY}." in reader.text
    assert f"Skipped, first at 128: no room for {NASTY}." in reader.text


DAMAGED = {
    "cut": ("{", "is not valid JSON"),
    "empty": ("", "is empty"),
    "deep": ("[" * 100_000, "is not valid: it is nested too deeply"),
    "no settings": ('{"task": "passkey", "models": []}', "is damaged: its settings are missing"),
    "no model": ('{"task": "passkey", "settings": {}, "models": [3]}', "is damaged, or no file of `eval passkey`"),
    "huge": ('{"task": "passkey", "settings": {}, "models": [{"cells": [{"size": 1e999}]}]}', "is damaged, or no file"),
    "no task": ('{"task": "harness", "settings": {}, "models": [{"tasks": [{}]}]}', "is damaged, or no file"),
    "no rows": ('{"task": "perplexity", "settings": {}, "models": [{"results": [{}]}]}', "is damaged, or no file"),
    "other <b>": ('{"task": "<b>", "settings": {}, "models": []}', "has results of '<b>'"),
    "study": ('{"format": "samba-lm study run", "run": "x"}', "is a damaged record of a study"),
}


def test_damaged_files_are_named_and_left_out(
    out: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "1000")
    _keep(out, "key.json")
    for name, (text, _) in DAMAGED.items():
        (out / f"{name}.json").write_text(text)
    _run("report", "out")
    told = capsys.readouterr().err
    reader = check(_text())
    for name, (_, why) in DAMAGED.items():
        assert f"Left out: {name}.json {why}" in told
        assert f"{name}.json {why}" in reader.text
    assert "<h2>Passkey</h2>" in _text(), "the others are there"


def test_other_files_are_passed_over(out: Path, capsys: pytest.CaptureFixture[str]) -> None:
    _keep(out, "key.json")
    (out / "config.json").write_text("{")
    (out / "notes.json").write_text('["a list"]')
    (out / "more.json").write_text('{"task": 3}')
    (out / ".hidden").mkdir()
    (out / ".hidden" / "x.json").write_text("{")
    (out / "loop").symlink_to(out)
    (out / "gone.json").symlink_to(out / "nowhere")
    _run("report", "out")
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["nowhere"], "There is no folder nowhere"),
        (["file.json"], "file.json is a file"),
        (["empty"], "empty holds no results: it is searched for files that `samba-lm eval"),
        (["damaged"], "and the records of a study. Of these a.json is not valid JSON ("),
        (["empty", "--out", "empty"], "--out empty is a folder"),
        ([], "DIR"),
    ],
)
def test_mistakes(
    words: list[str], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("empty").mkdir()
    Path("damaged").mkdir()
    Path("damaged/a.json").write_text("{")
    Path("file.json").write_text("{}")
    assert main(["report", *words]) == 2
    error = capsys.readouterr().err
    assert error.startswith("samba-lm: error: ")
    assert message in error
    assert error.count("\n") == 1
    assert not list(tmp_path.rglob("*.html"))


def test_names_are_as_short_as_they_can_be() -> None:
    assert shortest(["runs/a/samba", "runs/b/samba", "llama"]) == ["a/samba", "b/samba", "llama"]
    assert shortest(["samba", "runs/samba"]) == ["samba", "runs/samba"]
    assert shortest(["."]) == ["."]


def test_models_of_one_name_are_told_apart() -> None:
    base = {"name": "runs/x", "weights_sha256": "a" * 64, "config": "c", "tokenizer": "t", "dtype": "float32"}
    others = [{"quantized": None}, {"quantized": "int8"}, {"quantized": None, "weights_sha256": "b" * 64}]
    models = name_models([base | other for other in others] + [base | others[0]])
    assert [model.label for model in models.values()] == ["x aaaaaaaa", "x int8 aaaaaaaa", "x bbbbbbbb"]
    assert [model.style for model in models.values()] == [0, 1, 2]
    # Random weights have no hash: their names tell.
    random = base | {"weights_sha256": None, "quantized": None}
    assert key(random) != key(random | {"name": "y"})
