"""`samba-lm eval perplexity` on small checkpoints: tables, files that a later run goes on from, and every mistake."""

from __future__ import annotations

import csv
import json
import lzma
import math
import signal
import threading
from pathlib import Path

import numpy as np
import pytest
import torch

from samba_lm.checkpoint import create, save
from samba_lm.cli.main import main
from samba_lm.config import Attention, Mamba, ModelConfig
from samba_lm.data.prepare import prepare
from samba_lm.eval.perplexity import LengthResult, difference, perplexity
from samba_lm.eval.protocols import MEANING
from samba_lm.model import SambaLM
from samba_lm.tokenizer import BpeSpec, ByteTokenizer, train_bpe
from samba_lm.train.recipe import Recipe
from samba_lm.train.run import train

TEXT = "The sea is salt, as the tears are.\n" * 12  # 420 bytes


def _model(seed: int = 0, window: int | None = 8, vocab_size: int = 257) -> SambaLM:
    layers = (Mamba(state=4), Attention(heads=2, window=window))
    config = ModelConfig(name="tiny", d_model=16, vocab_size=vocab_size, layers=layers, max_context=100)
    return create(config, seed=seed)


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The current folder, with a checkpoint and two texts, in a terminal of usual width."""
    monkeypatch.setenv("COLUMNS", "100")
    monkeypatch.chdir(tmp_path)
    save(_model(), tmp_path / "model", ByteTokenizer())
    (tmp_path / "text").mkdir()
    (tmp_path / "text" / "a.txt").write_text(TEXT)
    (tmp_path / "text" / "b.txt").write_text(TEXT[:100])
    return tmp_path


def _run(*options: str, data: str = "text") -> int:
    """With the options, and checkpoints among them or the one there is."""
    checkpoints = [] if options and not options[0].startswith("-") else ["model"]
    return main(["eval", "perplexity", *checkpoints, "--device=cpu", *options, "--data", data])


def _error(capsys: pytest.CaptureFixture[str]) -> str:
    err = capsys.readouterr().err
    assert err.startswith("samba-lm: error: ")
    assert err.count("\n") == 1, err
    return err


def _read(path: str = "out.json") -> dict:
    return json.loads(Path(path).read_text())


def _expected(lengths: list[int], model: SambaLM | None = None, **settings: str) -> list[LengthResult]:
    documents = [np.append(ByteTokenizer().encode(text), 256) for text in (TEXT, TEXT[:100])]
    return perplexity(model or _model(), documents, lengths, tokenizer=ByteTokenizer(), **settings)  # type: ignore[arg-type]


def _row(out: str, name: object) -> list[str]:
    line = next(line for line in out.splitlines() if line.split("│")[0].strip() == str(name))
    return [part.strip() for part in line.split("│")[1:]]


def test_the_table_and_the_files_tell_what_was_measured(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    files = ["--json=out.json", "--csv=out.csv", "--figure=out.png"]
    assert _run("--lengths", "64,16,5000", *files) == 0
    out = capsys.readouterr().out
    record = _read()
    (model,) = record["models"]
    assert [entry["length"] for entry in model["results"]] == [16, 64, 5000]
    rows = list(csv.DictReader(Path("out.csv").read_text().splitlines()))
    for entry, row, result in zip(model["results"], rows, _expected([16, 64]), strict=False):
        low, high = result.interval
        for name, value in (("loss", result.loss), ("perplexity", result.perplexity), ("low", low), ("high", high)):
            assert entry[name] == pytest.approx(value, rel=1e-6)
            assert float(row[name]) == pytest.approx(value, rel=1e-6)
        assert entry["bits_per_byte"] == pytest.approx(result.bits_per_byte, rel=1e-6)
        assert entry["bits_low"] < entry["bits_per_byte"] < entry["bits_high"]
        assert entry["means"] == pytest.approx(result.means, rel=1e-6)
        assert _row(out, result.length) == [
            f"{result.perplexity:.3f}",
            f"{low:.3f}-{high:.3f}",
            f"{result.loss:.4f}",
            f"{result.bits_per_byte:.4f}",
            f"{result.windows}",
            f"{result.tokens:,}",
        ]
    assert model["results"][2]["loss"] is None
    assert model["results"][2]["skipped"] == "length 5,000 needs that many tokens, and the text has 522"
    assert "Skipped: length 5,000 needs that many tokens, and the text has 522." in out
    assert rows[2]["perplexity"] == ""
    assert record["task"] == "perplexity"
    assert record["meaning"] == MEANING["full-window"]
    assert record["settings"]["protocol"] == "full-window"
    assert record["data"]["documents"] == 2
    assert record["data"]["bytes"] == 520
    assert model["text"]["tokens"] == 522
    assert model["model"] == _model().config.to_dict()
    assert model["device"] == "cpu"
    assert model["dtype"] == "float32"
    assert len(model["weights_sha256"]) == len(record["settings"]["data_sha256"]) == 64
    assert Path("out.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize("columns", [40, 60, 100])
def test_several_checkpoints_stand_in_one_table(
    folder: Path, columns: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("COLUMNS", str(columns))
    save(_model(1, window=None), folder / "full", ByteTokenizer())
    name = "runs/a-name-that-is-long-enough-to-be-cut-off"
    save(_model(2), folder / name, ByteTokenizer())
    assert _run("model", "full", name, "--lengths=16,32,64,128,5000", "--csv=out.csv") == 0
    out = capsys.readouterr().out
    assert max(map(len, out.splitlines())) <= columns
    assert out.startswith("Perplexity (± 95%), protocol full-window")
    cells = [cell for line in out.splitlines() for cell in line.split("│")[1:] if line.startswith("full")]
    for result, cell in zip(_expected([16, 32, 64], _model(1, window=None)), cells, strict=False):
        low, high = result.interval
        assert cell.strip() == f"{result.perplexity:.2f} ±{(high - low) / 2:.2f}"
    assert cells[3].strip() == "-"
    told = " ".join(out.split())
    assert "full: full attention would have to hold 127 positions, and max_context is 100. Skipped: 128." in told
    assert "model: length 5,000 needs that many tokens, and the text has 522. Skipped: 5000." in told
    rows = list(csv.DictReader(Path("out.csv").read_text().splitlines()))
    assert [row["checkpoint"] for row in rows] == ["model"] * 5 + ["full"] * 5 + [name] * 5


def test_a_later_run_goes_on(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert _run("--lengths=16,64", "--json=out.json") == 0
    before = _read()["models"][0]["results"]
    save(_model(1), folder / "other", ByteTokenizer())
    assert _run("other", "model", "--lengths=16,32,64", "--json=out.json") == 0
    assert "model: 2 of 3 lengths were measured before." in capsys.readouterr().out
    first, second = _read()["models"]
    assert (first["name"], second["name"]) == ("model", "other")
    assert [row for row in first["results"] if row["length"] != 32] == before
    assert [row["length"] for row in second["results"]] == [16, 32, 64]
    # A run with fewer lengths shows these and keeps all.
    assert _run("--lengths=32", "--json=out.json") == 0
    out = capsys.readouterr().out
    assert _row(out, 32)
    assert not any(line.split("│")[0].strip() == "16" for line in out.splitlines())
    assert len(_read()["models"][0]["results"]) == 3
    # Of a model of the same name but other weights, nothing is kept.
    save(_model(2), folder / "model", ByteTokenizer())
    assert _run("--lengths=16", "--json=out.json") == 0
    assert len(_read()["models"]) == 3


def test_what_a_file_holds_is_read_back_whole(folder: Path) -> None:
    broken = _model()
    torch.nn.init.constant_(broken.norm.weight, math.nan)
    save(broken, folder / "broken", ByteTokenizer())
    options = ["--lengths=16,64,5000", "--protocol=prefix", "--documents=every", "--json=out.json"]
    assert _run("model", "broken", *options) == 2
    whole = _read()["models"]
    assert _run("model", "broken", *options) == 2
    assert _read()["models"] == whole


def test_other_settings_texts_and_files_are_refused(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert _run("--lengths=16,64", "--json=out.json") == 0
    capsys.readouterr()
    assert _run("--lengths=16,64", "--stride=4", "--json=out.json") == 2
    assert "out.json holds results with stride = None, not 4" in _error(capsys)
    assert _run("--lengths=16,64", "--protocol=prefix", "--json=out.json") == 2
    assert "protocol = 'full-window', not 'prefix'" in _error(capsys)
    assert _run("--lengths=16", "--json=out.json", data="text/a.txt") == 2
    assert "out.json holds results with other data: give" in _error(capsys)
    whole = Path("out.json").read_text()
    endless = whole.replace('"from": 1,', '"from": Infinity,', 1)
    assert endless != whole
    for text in (endless, "[]", "{}", '{"task": "passkey"}', "{", '{"task": "perplexity", "settings_sha256": 3}'):
        Path("out.json").write_text(text)
        assert _run("--lengths=16", "--json=out.json") == 2
        assert "out.json is no" in _error(capsys)
        assert Path("out.json").read_text() == text
    # The lengths of these decide which text all are measured on.
    for protocol in ("prefix", "last-stride", "stream"):
        assert _run("--lengths=16,64", f"--protocol={protocol}", f"--json={protocol}.json") == 0
        capsys.readouterr()
        assert _run("--lengths=16,32,128", f"--protocol={protocol}", f"--json={protocol}.json") == 2
        assert ("lengths = [16, 64]" if protocol == "stream" else "longest = 64, not 128") in _error(capsys)


def test_interrupted_before_anything_is_measured(
    folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def stop(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("samba_lm.eval.perplexity.measure", stop)
    assert _run("--lengths=16", "--json=a.json") == 130
    assert capsys.readouterr().out == "Stopped early. The same command goes on.\n", "no empty table"
    assert not [path.name for path in folder.iterdir() if path.name.endswith(".lock")]


def test_an_interrupted_run_keeps_what_is_finished(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    Path("long.txt").write_text(TEXT * 200)
    timer = threading.Timer(2.5, signal.raise_signal, [signal.SIGINT])
    timer.start()
    try:
        assert _run("--lengths=16,32,40,48,56,64,72,80", "--stride=1", "--json=out.json", data="long.txt") == 130
    finally:
        timer.join()
    told = capsys.readouterr()
    assert "The same command goes on." in told.out
    assert told.err == "samba-lm: interrupted\n"
    (model,) = _read()["models"]
    assert len(model["results"]) < 8


def test_checkpoints_with_different_tokenizers_are_compared_by_bits_a_byte(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    save(_model(vocab_size=280), folder / "bpe", train_bpe([TEXT], 280))
    assert _run("model", "bpe", "--lengths=16,64", "--json=out.json", "--figure=out.png") == 0
    out = capsys.readouterr().out
    assert "The tokenizers differ, so perplexities a token cannot be compared." in out
    byte, bpe = (model["results"][0] for model in _read()["models"])
    assert _row(out, "bpe")[0].startswith(f"{bpe['bits_per_byte']:.4f} ±")
    assert bpe["bits_per_byte"] != pytest.approx(byte["bits_per_byte"], rel=0.01)
    tokens = [model["text"]["tokens"] for model in _read()["models"]]
    assert tokens[1] < tokens[0] == 522


@pytest.mark.parametrize("columns", [40, 100])
def test_checkpoints_are_compared_with_one_of_them(
    folder: Path, columns: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("COLUMNS", str(columns))
    save(_model(1), folder / "other", ByteTokenizer())
    save(_model(vocab_size=280), folder / "bpe", train_bpe([TEXT], 280))
    command = ["other", "model", "bpe", "--lengths=16,64", "--against=model", "--json=out.json"]
    for _ in range(2):  # the second time from the file
        assert _run(*command) == 0
        out = capsys.readouterr().out
        assert max(map(len, out.splitlines())) <= columns
        told = out[out.index("Perplexity against that of model") :]
        ours, theirs = _expected([16], _model(1)), _expected([16])
        change = difference(ours[0], theirs[0])
        assert _row(told, "other")[0] == (
            f"{100 * math.expm1(change.mean):+.2f}% ±{50 * (math.exp(change.high) - math.exp(change.low)):.2f}"
        )
        assert "bpe has another tokenizer" in told
        assert not any(line.startswith(("model", "bpe ")) and "│" in line for line in told.splitlines())
    assert _run("other", "--lengths=16", "--against=model") == 2
    assert "--against model is none of the checkpoints" in _error(capsys)


def test_documents_are_told_apart(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = "".join(json.dumps({"text": TEXT[:size]}) + "\n" for size in (50, 3, 90))
    Path("text/c.jsonl.xz").write_bytes(lzma.compress(rows.encode()))
    assert _run("--lengths=40,80", "--protocol=stream", "--documents=every", "--json=out.json") == 0
    assert "protocol stream, every document that is long enough" in capsys.readouterr().out
    first, second = _read()["models"][0]["results"]
    names = [each["document"] for each in first["by_document"]]
    assert names == ["text/a.txt", "text/b.txt", "text/c.jsonl.xz:1", "text/c.jsonl.xz:3"]
    assert [each["document"] for each in second["by_document"]] == ["text/a.txt", "text/b.txt", "text/c.jsonl.xz:3"]
    assert (second["from"], second["to"]) == (40, 80)
    losses = [each["loss"] for each in first["by_document"]]
    assert first["loss"] == pytest.approx(sum(losses) / 4, rel=1e-6)
    prepare([folder / "text"], folder / "shards", ByteTokenizer())
    assert _run("--lengths=40,80", "--protocol=stream", "--json=shards.json", data="shards") == 0
    (one, _) = _read("shards.json")["models"][0]["results"]
    assert [each["document"] for each in one["by_document"]] == ["document 1", "document 2", "document 5"]


def test_prepared_data_give_the_figures_of_their_text(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    prepare([folder / "text"], folder / "shards", ByteTokenizer())
    for data in ("text", "shards"):
        assert _run("--lengths=16,64", "--protocol=prefix", f"--json={data}.json", data=data) == 0
    text, shards = (_read(f"{name}.json")["models"][0] for name in ("text", "shards"))
    for ours, theirs in zip(text["results"], shards["results"], strict=True):
        assert [ours[key] for key in ("loss", "low", "tokens")] == [theirs[key] for key in ("loss", "low", "tokens")]
    assert text["results"][1]["windows"] == 2
    assert text["text"] == shards["text"]


def test_of_prepared_splits_the_held_out_one_is_read(folder: Path) -> None:
    prepare([folder / "text" / "a.txt"], folder / "shards", ByteTokenizer(), val_fraction=0.25)
    assert _run("--lengths=16", "--json=out.json", data="shards") == 0
    assert _read()["data"]["paths"] == [str(Path("shards", "val"))]


@pytest.mark.parametrize("columns", [40, 60, 80, 120])
@pytest.mark.parametrize("protocol", ["full-window", "prefix", "last-stride", "stream", "sliding-window"])
def test_every_protocol_fits_the_terminal(
    folder: Path, protocol: str, columns: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("COLUMNS", str(columns))
    window = ["--window=12"] if protocol == "sliding-window" else []
    argv = ["eval", "perplexity", "model", "--data", "text", "--device=cpu", "--lengths=16,64,5000"]
    assert main([*argv, f"--protocol={protocol}", *window]) == 0
    out = capsys.readouterr().out
    assert protocol in out
    assert max(map(len, out.splitlines())) <= columns
    assert "…" not in out  # nothing is cut off
    assert ("16-64" in out) == (protocol == "stream")
    assert ("bits/byte" in out) == (columns > 64)
    assert ("windows" in out.splitlines()[1]) == (columns > 96)


def test_sliding_window_takes_the_trained_length(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert _run("--protocol=sliding-window", "--lengths=64") == 2
    assert "does not tell the length it was trained on: give it with --window N." in _error(capsys)
    prepare([folder / "text"], folder / "shards", ByteTokenizer())
    for length in (24, 32):
        recipe = {
            "model": {"name": "samba-tiny", "overrides": {"d_model": 16}},
            "data": {"train": str(folder / "shards")},
            "train": {"out": str(folder / f"run-{length}"), "steps": 1, "batch_size": 1, "length": length},
        }
        train(Recipe.from_dict(recipe))
    assert _run("run-24", "--protocol=sliding-window", "--lengths=64", "--json=out.json") == 0
    record = _read()
    assert record["settings"]["window"] == 24
    assert record["settings"]["stride"] == 12
    assert record["models"][0]["checkpoint"] == "run-24/step-00000001"
    assert record["models"][0]["trained_length"] == 24
    capsys.readouterr()
    assert _run("run-24", "run-32", "--protocol=sliding-window", "--lengths=64") == 2
    assert "on different lengths (run-24 24, run-32 32): give one with --window N." in _error(capsys)


def test_numbers_that_are_not_finite_are_shown_then_told(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    broken = _model()
    torch.nn.init.constant_(broken.norm.weight, math.nan)
    save(broken, folder / "broken", ByteTokenizer())
    assert _run("broken", "--lengths=16,64", "--json=out.json", "--figure=out.png") == 2
    told = capsys.readouterr()
    assert "Not finite: at length 64" in told.out
    assert told.err.startswith("samba-lm: error: broken: at length 16 the loss is not finite in 32 of 32 window(s)")
    assert [entry["loss"] for entry in _read()["models"][0]["results"]] == [None, None]
    assert Path("out.png").exists()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--lengths", "16,x"], "--lengths = 16,x: expected whole numbers with commas between"),
        (["--lengths", "16,"], "--lengths = 16,: expected whole numbers"),
        (["--lengths", "4G"], "--lengths = 4G: expected whole numbers"),
        (["--lengths", "1K"], "The text has 522 tokens, fewer than the shortest length, 1024"),
        (["--lengths", "1"], "lengths are [1]: give at least one, each of 2 tokens or more."),
        (["--lengths", "1000"], "The text has 522 tokens, fewer than the shortest length, 1000"),
        (["--protocol", "prefixes"], "Did you mean 'prefix'?"),
        (["--stride", "0"], "stride is 0: it must be at least 1."),
        (["--batch", "0"], "batch is 0: it must be at least 1."),
        (["--window", "8"], "window is 8, but full-window has none: leave it out, or use sliding-window."),
        (["--lenghts", "8"], "Unknown option '--lenghts'. Did you mean '--lengths'?"),
        (["--device", "gpu"], "Unknown device 'gpu'"),
        (["--documents", "every"], "documents is every, but full-window reads over their boundaries: leave it out."),
        (["--csv", "."], "--csv . is a folder"),
        (["--figure", "model/config.json/a.png"], "model/config.json is a file and no folder"),
        (["nowhere"], "nowhere"),
        (["model", "text"], "text"),
    ],
)
def test_mistakes(folder: Path, options: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert _run(*options) == 2
    assert message in _error(capsys)


def test_data_that_cannot_be_measured(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert _run(data="nowhere") == 2
    assert "nowhere does not exist" in _error(capsys)
    (folder / "latin.txt").write_bytes(TEXT.encode() + b"caf\xe9\n")
    assert _run(data="latin.txt") == 2
    assert "byte 423" in _error(capsys)
    assert _run("--errors=replace", "--lengths=64", data="latin.txt") == 0
    capsys.readouterr()
    (folder / "blank.txt").write_text(" \n")
    assert _run(data="blank.txt") == 2
    assert "hold only white space" in _error(capsys)
    prepare([folder / "text"], folder / "bpe", BpeSpec(257))
    assert _run("--lengths=16", data="bpe") == 2
    assert "bpe was made with another tokenizer than that of model" in _error(capsys)
    assert main(["eval", "perplexity", "model", "--data", "bpe", "text"]) == 2
    assert "is prepared data, and 1 more were given" in _error(capsys)


def test_a_checkpoint_without_tokenizer_reads_only_prepared_data(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    save(_model(), folder / "bare")
    assert _run("bare", "--lengths=16") == 2
    assert "bare has no tokenizer to read text with" in _error(capsys)
    prepare([folder / "text"], folder / "shards", ByteTokenizer())
    assert _run("model", "bare", "--lengths=16", "--json=out.json", data="shards") == 0
    assert "Perplexity (± 95%)" in capsys.readouterr().out
    assert len(_read()["models"]) == 2
    assert main(["eval", "perplexity", "--data", "text"]) == 2
    assert "Which checkpoint?" in _error(capsys)


def test_help_says_what_each_protocol_measures(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        main(["eval", "perplexity", "--help"])
    assert stop.value.code == 0
    out = " ".join(capsys.readouterr().out.split())
    for name, meaning in MEANING.items():
        assert f"{name}: {meaning}" in out
