"""`samba-lm eval passkey` and `eval phonebook`: tables, files that a later run goes on from, and every mistake."""

from __future__ import annotations

import csv
import json
import math
import shutil
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch

from samba_lm.checkpoint import create, load, save
from samba_lm.cli.main import main
from samba_lm.config import Attention, Mamba, ModelConfig
from samba_lm.tokenizer import ByteTokenizer

SMALL = ["--lengths=300,400", "--depths=3", "--keys=2", "--device=cpu"]


def _save(folder: Path, seed: int = 0, window: int | None = 16) -> None:
    layers = (Mamba(state=4), Attention(heads=2, window=window))
    config = ModelConfig(name="tiny", d_model=16, vocab_size=257, layers=layers, max_context=350)
    save(create(config, seed=seed), folder, ByteTokenizer())


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with a checkpoint, the current one, in a terminal of usual width."""
    monkeypatch.setenv("COLUMNS", "100")
    monkeypatch.chdir(tmp_path)
    _save(tmp_path / "model")
    return tmp_path


def _error(capsys: pytest.CaptureFixture[str]) -> str:
    err = capsys.readouterr().err
    assert err.startswith("samba-lm: error: ")
    assert err.count("\n") == 1, err
    return err


def _read(path: str) -> dict:
    return json.loads(Path(path).read_text())


def test_the_table_and_the_files_tell_the_same(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    files = ["--json=a.json", "--csv=a.csv", "--figure=a.png"]
    assert main(["eval", "passkey", "model", *SMALL, "--control", *files]) == 0
    out = capsys.readouterr().out
    assert "passkey, 2 texts in each of 6 cells" in out
    for length in (300, 400):
        row = next(line for line in out.splitlines() if line.split("│")[0].strip() == str(length))
        assert [part.strip() for part in row.split("│")[1:]] == ["0/6", "0.0%", "0-39", "0", "0", "---"]
    record = _read("a.json")
    assert record["settings"]["seed"] == "operating system's randomness"
    (model,) = record["models"]
    assert len(model["weights_sha256"]) == 64
    assert [(cell["size"], cell["depth"]) for cell in model["cells"]] == [
        (length, depth) for length in (300, 400) for depth in (0.0, 0.5, 1.0)
    ]
    assert [size["total"] for size in model["by_size"]] == [6, 6]
    trials = [trial for cell in model["cells"] for trial in cell["trials"]]
    assert len({trial["answer"] for trial in trials}) > 1
    assert all(len(trial["answer"]) == 5 and trial["control"] is not None for trial in trials)
    rows = list(csv.DictReader(Path("a.csv").read_text().splitlines()))
    assert [rows[0][key] for key in ("size", "depth", "right", "total")] == ["300", "0.0", "0", "2"]
    assert len(rows) == 6
    assert Path("a.png").read_bytes().startswith(b"\x89PNG")


def test_steps_of_a_run_are_drawn_as_curves(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    drawn = []
    monkeypatch.setattr("samba_lm.figures.save_figure", lambda path, figure: drawn.append(figure))
    monkeypatch.setattr("samba_lm.eval.recall_figure.save_figure", lambda path, figure: drawn.append(figure))
    for step in (10, 5):
        _save(folder / f"run/step-{step:08}", seed=step)
    steps = ["run/step-00000010", "run/step-00000005"]
    over = "steps of the training"
    for given, axes in ((steps, over), ([*steps, "run", steps[0]], over), ([*steps, "model"], "tokens of the text")):
        assert main(["eval", "passkey", *given, *SMALL, "--figure=a.png"]) == 0
        assert drawn.pop().axes[0].get_xlabel() == axes
    assert main(["eval", "passkey", *steps, *SMALL, "--json=out/a.json"]) == 0
    assert main(["report", "out"]) == 0
    page = Path("out/report.html").read_text()
    assert "Right answers by the step of the training" in page
    assert 'class="plot map"' not in page


def test_a_later_run_goes_on(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    _save(folder / "other", seed=1)
    command = ["eval", "passkey", "model", *SMALL, "--json=a.json"]
    assert main(command) == 0
    before = _read("a.json")["models"][0]["cells"]
    assert main(["eval", "passkey", "other", "model", *SMALL, "--lengths=300,333,400", "--json=a.json"]) == 0
    assert "6 of the cells were measured before." in capsys.readouterr().out
    first, second = _read("a.json")["models"]
    assert (first["name"], second["name"]) == ("model", "other")
    assert [cell for cell in first["cells"] if cell["size"] != 333] == before
    assert len(first["cells"]) == len(second["cells"]) == 9
    # Of a model of the same name but other weights, nothing is kept.
    _save(folder / "model", seed=2)
    assert main(command) == 0
    assert len(_read("a.json")["models"]) == 3


def test_other_settings_and_other_files_are_refused(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["eval", "passkey", "model", *SMALL, "--json=a.json"]) == 0
    capsys.readouterr()
    assert main(["eval", "passkey", "model", *SMALL, "--keys=3", "--seed=5", "--json=a.json"]) == 2
    assert 'a.json holds results with trials = 2, not 3, seed = "operating system\'s randomness", not 5' in _error(
        capsys
    )
    for text in ("[]", "{}", '{"settings_sha256": 3}', "{"):
        Path("a.json").write_text(text)
        assert main(["eval", "passkey", "model", *SMALL, "--json=a.json"]) == 2
        assert "a.json is no" in _error(capsys)
        assert Path("a.json").read_text() == text


def test_an_interrupted_run_keeps_what_is_finished(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command = ["eval", "passkey", "model", "--lengths=300", "--depths=2000", "--keys=1", "--device=cpu"]
    timer = threading.Timer(2.5, signal.raise_signal, [signal.SIGINT])
    timer.start()
    try:
        assert main([*command, "--json=a.json"]) == 130
    finally:
        timer.join()
    told = capsys.readouterr()
    assert "The same command goes on." in told.out
    assert told.err == "samba-lm: interrupted\n"
    assert 0 < len(_read("a.json")["models"][0]["cells"]) < 2000
    assert [path.name for path in folder.iterdir() if "a.json" in path.name] == ["a.json"], "nothing is left behind"


HOLDER = """
import sys, time
from samba_lm.files import locked
with locked(sys.argv[1], "busy"):
    print("held", flush=True)
    time.sleep(100)
"""


def test_two_commands_do_not_write_one_file(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command = ["eval", "passkey", "model", *SMALL, "--json=a.json"]
    assert main(command) == 0
    before = Path("a.json").read_bytes()
    lock = folder / ".a.json.lock"
    with subprocess.Popen([sys.executable, "-c", HOLDER, lock], stdout=subprocess.PIPE) as other:
        try:
            assert other.stdout is not None
            assert other.stdout.readline() == b"held\n"
            assert main([*command, "--lengths=500"]) == 2
            assert "Another command is writing a.json: wait for it, or give another file with --json." in _error(capsys)
            assert Path("a.json").read_bytes() == before
        finally:
            other.kill()
    assert lock.exists(), "a killed command leaves its lock's file, which holds nobody up"
    assert main([*command, "--lengths=500"]) == 0
    assert not lock.exists()
    assert {cell["size"] for cell in _read("a.json")["models"][0]["cells"]} == {300, 400, 500}


def test_without_a_control_its_column_is_empty(folder: Path) -> None:
    command = ["eval", "passkey", "model", "--lengths=300,400", "--depths=1", "--keys=2", "--device=cpu"]
    for _ in range(2):  # measured, and read from the file
        assert main([*command, "--json=a.json", "--csv=a.csv"]) == 0
        (model,) = _read("a.json")["models"]
        assert [cell["control_right"] for cell in [*model["cells"], *model["by_size"]]] == [None] * 4
        assert {row["control_right"] for row in csv.DictReader(Path("a.csv").read_text().splitlines())} == {""}
    # Earlier versions wrote that nothing was right.
    record = _read("a.json")
    for trial in record["models"][0]["cells"][0]["trials"]:
        trial["control_right"] = False
    Path("a.json").write_text(json.dumps(record))
    assert main([*command, "--json=a.json"]) == 0
    assert _read("a.json")["models"][0]["by_size"][0]["control_right"] is None


def test_lengths_beyond_full_attention_are_marked(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    _save(folder / "full", window=None)
    assert main(["eval", "passkey", "full", *SMALL, "--json=a.json", "--csv=a.csv", "--figure=a.png"]) == 0
    assert "Skipped 400: full attention would have to hold" in capsys.readouterr().out
    cells = _read("a.json")["models"][0]["cells"]
    assert ["max_context is 350" in cell["skipped"] for cell in cells] == [False] * 3 + [True] * 3
    assert cells[3]["accuracy"] is None
    assert list(csv.DictReader(Path("a.csv").read_text().splitlines()))[3]["accuracy"] == ""


@pytest.mark.parametrize("columns", [40, 100])
def test_a_phonebook_with_names_of_ones_own(
    folder: Path, columns: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("COLUMNS", str(columns))
    Path("names.txt").write_text("".join(f"Person {chr(65 + i)}{chr(65 + j)}\n" for i in range(5) for j in range(5)))
    command = ["eval", "phonebook", "model", "--pairs=5..25:10", "--prompts=3", "--names=names.txt", "--device=cpu"]
    assert main([*command, "--json=a.json", "--figure=a.png"]) == 0
    out = capsys.readouterr().out
    assert max(map(len, out.splitlines())) <= columns
    assert "0/3" in out
    record = _read("a.json")
    assert [cell["size"] for cell in record["models"][0]["cells"]] == [5, 15, 25]
    assert record["settings"]["names"] == "names.txt"
    assert record["unit"] == "pairs"
    assert main([*command, "--pairs=26"]) == 2
    assert "A phonebook of 26 entries needs as many names, and names.txt has 25." in _error(capsys)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ([], "Which checkpoint?"),
        (["model", "--lengths=300,200"], "length 200 is too short"),
        (["model", "--depths=1.5"], "depth is 1.5: it must be from 0"),
        (["model", "--depths=half"], "--depths = half: expected how many, such as 11"),
        (["model", "--depths=nan"], "depth is nan"),
        (["model", "--keys=0"], "--keys = 0: give 1 at least"),
        (["model", "--filler=none.txt"], "There is no file none.txt"),
        (["model", "--json=."], "--json . is a folder"),
        (["model", "--csv=."], "--csv . is a folder"),
        (["model", "--json=a.txt", "--csv=./a.txt"], "--json and --csv are both a.txt: give each"),
        (["model", "--figure=model/config.json/a.png"], "model/config.json is a file and no folder"),
        (["model", "--figure=a.jpg"], "--figure a.jpg: its name must end in .png, .svg or .pdf"),
        (["model", "nowhere"], "nowhere"),
    ],
)
def test_mistakes(folder: Path, options: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["eval", "passkey", *options, "--device=cpu"]) == 2
    assert message in _error(capsys)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("size", None),
        ("size", -5),
        ("seconds", "abc"),
        ("seconds", None),
        ("trials", []),
        ("right", "x"),
        ("right", None),
        ("right", -3),
        ("exact", 1),
        ("written", None),
        ("control_right", None),
    ],
)
def test_a_file_with_a_damaged_cell_is_refused(
    folder: Path, field: str, value: object, capsys: pytest.CaptureFixture[str]
) -> None:
    options = ["--lengths=300", "--depths=2", "--keys=1", "--control", "--device=cpu", "--json=a.json"]
    assert main(["eval", "passkey", "model", *options]) == 0
    record = _read("a.json")
    cell = record["models"][0]["cells"][0]
    (cell if field in cell and field not in ("right", "exact", "control_right") else cell["trials"][0])[field] = value
    Path("a.json").write_text(json.dumps(record))
    capsys.readouterr()
    assert main(["eval", "passkey", "model", *options]) == 2
    assert "a.json is no file of `eval passkey`" in _error(capsys)


def test_of_several_checkpoints_the_damaged_one_is_named(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    _save(folder / "bad")
    model, tokenizer = load("bad")
    with torch.no_grad():
        model.embedding.fill_(math.nan)
    save(model, folder / "bad", tokenizer)
    assert main(["eval", "passkey", "model", "bad", *SMALL, "--json=a.json"]) == 2
    assert "error: bad: The model's outputs are not finite" in _error(capsys)
    assert _read("a.json")["models"][0]["name"] == "model"


@pytest.mark.parametrize(
    ("pairs", "message"),
    [
        ("9..3", "--pairs = 9..3: 9 is more than 3: give FIRST..LAST"),
        ("1..3:0", "steps of 0 lead nowhere"),
        *((each, "expected FIRST..LAST") for each in ("a", "3,", "")),
    ],
)
def test_pairs_that_are_none(folder: Path, pairs: str, message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["eval", "phonebook", "model", f"--pairs={pairs}"]) == 2
    assert message in _error(capsys)


def test_a_checkpoint_without_tokenizer_is_told_before_others_are_measured(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    save(create(ModelConfig(name="tiny", d_model=16, vocab_size=257, layers=(Mamba(state=4),))), folder / "bare")
    assert main(["eval", "passkey", "model", "bare", *SMALL]) == 2
    assert "bare has no tokenizer" in _error(capsys)
    shutil.copytree(folder / "model", folder / "lost")
    (folder / "lost" / "tokenizer.json").unlink()
    assert main(["eval", "passkey", "model", "lost", *SMALL]) == 2
    told = capsys.readouterr()
    assert "lost has lost its tokenizer.json" in told.err
    assert told.out == ""


@pytest.mark.parametrize(
    ("command", "options", "told"),
    [
        ("passkey", ["--depths=100000000000"], "--depths names 100,000,000,000: give at most 10,000."),
        ("passkey", ["--keys=100000000000000"], "--keys names 100,000,000,000,000: give at most 100,000."),
        ("phonebook", ["--pairs=3..100000000000"], "--pairs names 5,000,000,000: give at most 10,000."),
        ("phonebook", ["--prompts=1000000"], "--prompts names 1,000,000: give at most 100,000."),
    ],
)
def test_more_than_could_ever_be_asked_is_told_at_once(
    folder: Path, capsys: pytest.CaptureFixture[str], command: str, options: list[str], told: str
) -> None:
    assert main(["eval", command, "model", *options]) == 2
    assert told in _error(capsys)
