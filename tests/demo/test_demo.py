"""The demo end to end on a small text, what it says of its figures, and what it refuses."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from rich.console import Console

import samba_lm
from samba_lm.demo import report, run
from samba_lm.demo.corpus import standard_library, write_reference
from samba_lm.demo.folder import TWINS, clean
from samba_lm.demo.run import DemoSettings, Twin, verdict
from samba_lm.errors import UserError
from samba_lm.eval.perplexity import LengthResult


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """The same story with sequences of 16 bytes, two at a time."""
    for module in (run, report):
        monkeypatch.setattr(module, "LENGTH", 16)
    monkeypatch.setattr(run, "BATCH", 2)
    monkeypatch.setattr(run, "PATIENCE", 1000.0)  # a busy test machine must not end a story early


def texts(folder: Path) -> list[Path]:
    folder.mkdir()
    words = "the state is small and the text is long; the window slides and the state remains. "
    for i in range(30):
        (folder / f"{i}.txt").write_text(f"Chapter {i}. " + words * 5)
    return [folder]


def test_the_whole_story(small: None, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "out"
    result = run.run(DemoSettings(out, texts(tmp_path / "texts"), seconds=1.0), Console(width=60))
    page = report.write_report(result, {"command": ["samba-lm", "demo"], "torch": torch.__version__}, out)

    told = capsys.readouterr().out
    assert [f"{i}/7" for i in range(1, 8)] == re.findall(r"^(\d/7)", told, re.MULTILINE)
    html = page.read_text()
    for twin in result.twins:
        assert len(twin.losses) == result.steps
        assert [r.length for r in twin.results] == [16, 32, 64, 128, 256]
        assert len({r.windows * r.length for r in twin.results}) == 1, "the same text at every length"
        for r in twin.results:
            assert f"<td>{r.perplexity:.2f}</td>" in html
        loaded, tokenizer = samba_lm.load(out / twin.name)
        assert loaded.config.name == twin.name
        assert tokenizer is not None
    assert len(result.sample.encode()) > 0
    assert len(re.findall(r'<svg class="plot (?:wide|narrow)"', html)) == 4
    assert all((out / f"{name}.png").read_bytes().startswith(b"\x89PNG") for name in ("loss", "perplexity"))
    assert not re.search(r'(src|href)="(?!#)', html), "the page needs nothing else"
    plain = json.loads(json.dumps(report.record(result)))
    assert plain["twins"][0]["perplexity"]["256"] == result.twins[0].results[-1].perplexity
    clean(out, [tmp_path / "texts"])
    assert not list(out.iterdir())


def test_the_same_seed_trains_the_same_models(small: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calibrate = run._calibrate
    # The number of steps is the machine's; here it is given, so that everything else can be compared.
    monkeypatch.setattr(run, "_calibrate", lambda *args: replace(calibrate(*args), step_seconds=0.01))
    weights = []
    for i in (1, 2):
        settings = DemoSettings(tmp_path / str(i), texts(tmp_path / f"texts{i}"), seconds=1.0)
        run.run(settings, Console(quiet=True))
        weights.append([(tmp_path / str(i) / name / "model.safetensors").read_bytes() for name in TWINS])
    assert weights[0] == weights[1]


def twin(name: str, first: float, last: float) -> Twin:
    results = [LengthResult(n, (1, n), 1, n, 0.0, 0.0, p, None) for n, p in ((256, first), (4096, last))]
    return Twin(name, 1, 1.0, [1.0], results=results)


@pytest.mark.parametrize(
    ("samba", "llama", "steps", "words"),
    [
        ((4.0, 3.9), (4.0, 9.0), 500, "the claim holds in this run"),
        ((4.0, 4.5), (4.0, 9.0), 500, "only full attention's half of it holds in this run"),
        ((4.0, 3.9), (4.0, 4.0), 500, "only Samba's half of it holds in this run"),
        ((4.0, 4.5), (4.0, 3.0), 500, "it does not hold in this run"),
        ((4.0, 4.0), (4.0, 4.03), 20, "20 steps are too few to tell"),
    ],
)
def test_the_verdict_can_turn_out_either_way(
    samba: tuple[float, float], llama: tuple[float, float], steps: int, words: str
) -> None:
    told = verdict([twin("samba-tiny", *samba), twin("llama-tiny", *llama), twin("mamba-tiny", 3.0, 2.0)], steps)
    assert words in told
    assert f"{100 * (samba[1] / samba[0] - 1):+.1f}%" in told
    assert "mamba-tiny by -33.3%" in told
    assert "The lowest at 4096 is mamba-tiny's 2.00" in told


def test_a_machine_that_gets_busy_stops_all_at_one_step(
    small: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    calibrate = run._calibrate
    # Promise a speed that no machine has: patience ends in the first model already.
    monkeypatch.setattr(run, "_calibrate", lambda *args: replace(calibrate(*args), step_seconds=1e-5))
    monkeypatch.setattr(run, "PATIENCE", 1.25)
    result = run.run(DemoSettings(tmp_path / "out", texts(tmp_path / "texts"), seconds=1.0), Console(width=100))
    assert "the machine got busy: stopped at step" in capsys.readouterr().out
    assert result.steps == min(len(twin.losses) for twin in result.twins)
    assert all(twin.results[-1].windows > 0 for twin in result.twins)


def test_too_little_text_is_named(tmp_path: Path) -> None:
    file = tmp_path / "short.txt"
    file.write_text("Too short to learn from. " * 20)
    with pytest.raises(UserError, match=r"text has .* the demo needs .* --text"):
        run.run(DemoSettings(tmp_path / "out", [file], seconds=1.0), Console(quiet=True))


def test_it_deletes_nothing_but_its_own(tmp_path: Path) -> None:
    (tmp_path / "thesis.txt").write_text("years of work")
    with pytest.raises(UserError, match=r"thesis\.txt"):
        clean(tmp_path, [])
    assert (tmp_path / "thesis.txt").read_text() == "years of work"


def test_texts_in_its_folder_are_not_touched(tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "novel.txt").write_text("the only copy")
    for given in ([tmp_path / "data"], []):
        with pytest.raises(UserError, match=r"choose another folder with --out"):
            clean(tmp_path, given)
    assert (tmp_path / "data" / "novel.txt").read_text() == "the only copy"


def test_a_missing_text_costs_no_earlier_demo(tmp_path: Path) -> None:
    (tmp_path / "report.html").write_text("the last run")
    with pytest.raises(UserError, match=r"typo\.txt"):
        clean(tmp_path, [tmp_path / "typo.txt"])
    assert (tmp_path / "report.html").exists()


def test_the_standard_library_is_there(tmp_path: Path) -> None:
    files = standard_library()
    assert any(p.name == "argparse.py" for p in files)
    assert not any({"test", "tests", "site-packages"} & set(p.parts[-4:-1]) for p in files)
    write_reference(tmp_path / "reference.jsonl")
    topics = [json.loads(line) for line in (tmp_path / "reference.jsonl").read_text().splitlines()]
    assert len(topics) > 50
    assert all(topic["text"] for topic in topics)
