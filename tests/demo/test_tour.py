"""The minute with a trained model: the whole of it on an untrained one, what it plans, what it refuses."""

from __future__ import annotations

import json
import re
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from rich.console import Console

import samba_lm
from samba_lm.cli.main import main
from samba_lm.config import Attention, ModelConfig
from samba_lm.demo import tour, tour_page
from samba_lm.demo.corpus import read_texts
from samba_lm.demo.folder import PAGES
from samba_lm.demo.tour import LONGEST, SHORTEST, TourSettings, contexts, document_length, shown, verdict
from samba_lm.errors import UserError


@pytest.fixture
def short(monkeypatch: pytest.MonkeyPatch) -> None:
    """The same tour with a short document and short contexts, however fast this machine is."""
    monkeypatch.setattr(tour, "LONGEST", 2048)
    monkeypatch.setattr(tour, "SHORTEST", 2048)
    monkeypatch.setattr(tour, "WRITTEN", 8)
    monkeypatch.setattr(tour, "CONTEXTS", ((1024, 2),))
    monkeypatch.setattr(tour, "THREADS", 1)


def test_the_whole_tour(short: None, nano: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "out"
    assert main(["demo", "--seconds", "10", "--out", str(out), "--json", str(tmp_path / "j.json")]) == 0
    told = capsys.readouterr().out
    assert re.findall(r"^(\d/5)", told, re.MULTILINE) == [f"{i}/5" for i in range(1, 6)]
    assert "samba-nano is a small base model" in " ".join(told.split())
    assert {p.name for p in out.iterdir()} == PAGES - {"loss.png"}
    record = json.loads((tmp_path / "j.json").read_text())
    trial = record["recall"]["trial"]
    assert re.fullmatch(r"[1-9]\d{4}", trial["answer"])
    assert f"The pass key is {trial['answer']}:" in told
    assert 2000 < trial["tokens"] <= 2048 == record["recall"]["document_tokens"]
    digits = re.search(r"\d+", trial["written"])
    assert trial["right"] == (digits is not None and digits.group() == trial["answer"])
    assert trial["control"] is not None
    assert not trial["control_right"]
    assert record["reading"]["tokens"][-1] == 2048
    assert len(record["reading"]["resident"]) == len(record["reading"]["tokens"])
    assert [row["length"] for row in record["perplexity"]] == [256, 512, 1024]
    assert len({row["windows"] * row["length"] for row in record["perplexity"]}) == 1, "the same text at every length"
    for row in record["perplexity"]:
        assert re.search(rf"{row['length']:,} tokens +{row['perplexity']:.2f}", told)
    page = (out / "report.html").read_text()
    assert f"The pass key is {trial['answer']}." in page
    assert not re.search(r'(src|href)="(?!data:|#)', page), "the page needs nothing else"
    assert page.count("<svg") >= 4


def test_the_number_is_a_new_one_each_time_and_the_story_the_seeds(short: None, nano: Path, tmp_path: Path) -> None:
    model, tokenizer = samba_lm.load("samba-nano")
    runs = [
        tour.run(TourSettings(tmp_path, (), 10, seed), "samba-nano", model, tokenizer, Console(quiet=True))
        for seed in (0, 0, 1)
    ]
    answers = {run.trial.answer for run in runs if run.trial is not None}
    assert len(answers) > 1
    assert runs[0].written == runs[1].written != runs[2].written


def test_the_users_own_text_hides_the_number_and_makes_the_curve(
    short: None, nano: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    book = tmp_path / "sea.txt"
    book.write_text("The sea was calm that day. Nobody knew why! " * 60)
    out = tmp_path / "out"
    assert main(["demo", "--seconds", "10", "--text", str(book), "--out", str(out)]) == 0
    told = " ".join(capsys.readouterr().out.split())
    assert "hidden in 2,048 tokens of sea.txt" in told
    assert "against context, on sea.txt" in told
    book.write_text("The sea.")
    assert main(["demo", "--seconds", "10", "--text", str(book), "--out", str(out)]) == 2
    assert "sea.txt has 9 tokens, and the demo needs 256 at least" in capsys.readouterr().err


def test_a_model_that_cannot_hold_the_document_is_told(short: None, tmp_path: Path, capsys) -> None:
    config = ModelConfig(name="full", d_model=32, vocab_size=257, layers=(Attention(heads=2),), max_context=600)
    model = samba_lm.create(config)
    console = Console(width=100)
    settings = TourSettings(tmp_path, (), 10)
    result = tour.run(settings, "full", model, samba_lm.ByteTokenizer(), console)
    told = " ".join(capsys.readouterr().out.split())
    assert "not read: full attention would have to hold" in told
    assert "not measured: full attention would have to hold 1,023 positions" in told
    assert [r.length for r in result.results] == [256, 512]
    page = tour_page.write_page(result, {}, tmp_path).read_text()
    assert "The document was not read" in page
    assert "growing with the text" in page
    json.dumps(tour_page.record(result))


def test_right_and_wrong_are_told_as_they_are(short: None, nano: Path, tmp_path: Path) -> None:
    model, tokenizer = samba_lm.load("samba-nano")
    result = tour.run(TourSettings(tmp_path, (), 10), "samba-nano", model, tokenizer, Console(quiet=True))
    assert result.cell is not None
    trial = replace(result.cell.trials[0], answer="12345", written=" 12345 <b>", right=True, control="no")
    result.cell = replace(result.cell, trials=(trial,))
    page = tour_page.write_page(result, {}, tmp_path).read_text()
    assert '<td class="text">12345 &lt;b&gt;</td><td class="text">right</td>' in page
    assert "wrong, as it should be" in page
    leaking = replace(trial, right=False, control_right=True)
    result.cell = replace(result.cell, trials=(leaking,))
    page = tour_page.write_page(result, {}, tmp_path).read_text()
    assert '<td class="text">wrong</td>' in page
    assert "right, so something leaks" in page

    for change, words in ((0.9, "more context helps"), (1.0, "no difference"), (1.1, "more context hurts")):
        last = replace(result.results[-1], perplexity=change * result.results[0].perplexity)
        result.results = [*result.results[:-1], last]
        assert words in verdict(result)
        assert f"{100 * (change - 1):+.1f}%" in verdict(result)
    assert shown("") == "(nothing)"
    assert shown(" 12345\n. ") == "12345 ."
    assert len(shown("word " * 50)) <= 27


def test_the_document_is_as_long_as_there_is_time_for() -> None:
    assert document_length(1e6, 60) == LONGEST
    assert document_length(1.0, 1.0) == SHORTEST
    assert document_length(8000, 39) == LONGEST, "what 8,000 tokens a second must do"
    for speed in (100, 1500, 5000):
        length = document_length(speed, 39)
        assert length & (length - 1) == 0
        assert length / speed <= 39


@pytest.mark.parametrize("speed", [50, 1000, 4000, 12_000, 1e6])
@pytest.mark.parametrize("seconds", [-5, 0, 1, 15])
@pytest.mark.parametrize("tokens", [200, 300, 5000, 150_000])
def test_contexts_fit_the_time_and_the_text(speed: float, seconds: float, tokens: int) -> None:
    lengths, count = contexts(speed, seconds, tokens)
    assert lengths == sorted(length for length in lengths if 256 <= length <= tokens)
    assert bool(lengths) == (tokens >= 256)
    if lengths:
        assert all(count % length == 0 for length in lengths)
        smallest = count == max(tour.CONTEXTS[-1][0], lengths[-1])
        assert smallest or (count * len(lengths) / speed <= seconds and count <= tokens)


def test_the_faster_number_of_threads_is_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tour, "THREADS", 2)
    try:
        assert tour._fastest(lambda: time.sleep(0.02 * torch.get_num_threads()))[0] == 1
        assert torch.get_num_threads() == 1
        assert tour._fastest(lambda: time.sleep(0.04 / torch.get_num_threads()))[0] == 2
    finally:
        torch.set_num_threads(1)


def test_what_it_refuses(nano: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("words")
    for words, message in (
        (["--quick"], "--quick and --minutes are for --train"),
        (["--minutes", "2"], "--quick and --minutes are for --train"),
        (["--seconds", "1"], "--seconds 1 must be from 10 to 3600"),
        (["--seconds", "nan"], "--seconds nan must be"),
        (["--seed", "-1"], "--seed -1 must be from 0"),
        (["--out", str(tmp_path / "mine")], "holds 'thesis.txt', which is no demo's"),
        (["--text", str(tmp_path / "none.txt")], "none.txt"),
        (["no/such/model"], "no folder 'no/such/model'"),
        (["--train", "--seconds", "60", "--minutes", "1"], "--seconds and --minutes were both given"),
        (["--train", "--seconds", "3"], "--seconds 3 must be from half a minute"),
        (["--train", "runs/mine"], "--train trains models of its own"),
    ):
        assert main(["demo", *words]) == 2, words
        told = capsys.readouterr()
        assert message in told.err, words
        assert told.err.count("\n") == 1
    assert [p.name for p in (tmp_path / "mine").iterdir()] == ["thesis.txt"]
    assert not Path("samba-demo").exists()


def test_texts_are_read_whole(tmp_path: Path) -> None:
    text, source = read_texts(())
    assert len(text) > 300_000
    assert source == "Python's language reference"
    (tmp_path / "a.txt").write_text("one")
    (tmp_path / "b.jsonl").write_text('{"text": "two"}\n{"text": "three"}\n')
    assert read_texts([tmp_path]) == ("one\ntwo\nthree\n", tmp_path.name)
    (tmp_path / "c").mkdir()
    (tmp_path / "c" / "d.txt").write_text(" \n")
    with pytest.raises(UserError, match="hold no words"):
        read_texts([tmp_path / "c"])
