"""`samba-lm eval perplexity` on a small checkpoint: the table, the JSON, and every mistake in one line."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch

from samba_lm.checkpoint import create, save
from samba_lm.cli.main import main
from samba_lm.config import Attention, Mamba, ModelConfig
from samba_lm.data.prepare import prepare
from samba_lm.eval.perplexity import perplexity
from samba_lm.eval.protocols import MEANING
from samba_lm.model import SambaLM
from samba_lm.tokenizer import BpeSpec, ByteTokenizer
from samba_lm.train.recipe import Recipe
from samba_lm.train.run import train

TEXT = "The sea is salt, as the tears are.\n" * 12  # 420 bytes


def _model() -> SambaLM:
    layers = (Mamba(state=4), Attention(heads=2, window=8))
    return create(ModelConfig(name="tiny", d_model=16, vocab_size=257, layers=layers))


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with a checkpoint and two texts, in a terminal of usual width."""
    monkeypatch.setenv("COLUMNS", "100")
    save(_model(), tmp_path / "model", ByteTokenizer())
    (tmp_path / "text").mkdir()
    (tmp_path / "text" / "a.txt").write_text(TEXT)
    (tmp_path / "text" / "b.txt").write_text(TEXT[:100])
    return tmp_path


def _run(folder: Path, *options: str, data: str = "text") -> int:
    return main(["eval", "perplexity", str(folder / "model"), "--data", str(folder / data), "--device=cpu", *options])


def _error(capsys: pytest.CaptureFixture[str]) -> str:
    err = capsys.readouterr().err
    assert err.startswith("samba-lm: error: ")
    assert err.count("\n") == 1, err
    return err


def test_the_table_and_the_json_tell_what_was_measured(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert _run(folder, "--lengths", "64,16,5000", "--json", str(folder / "out.json")) == 0
    out = capsys.readouterr().out
    record = json.loads((folder / "out.json").read_text())
    documents = [ByteTokenizer().encode(text) for text in (TEXT, TEXT[:100])]
    documents = [torch.cat((torch.from_numpy(d), torch.tensor([256]))).numpy() for d in documents]
    expected = perplexity(_model(), documents, [16, 64], tokenizer=ByteTokenizer())
    assert [entry["length"] for entry in record["results"]] == [16, 64, 5000]
    for entry, result in zip(record["results"], expected, strict=False):
        assert entry["loss"] == pytest.approx(result.loss, rel=1e-6)
        assert entry["tokens"] == result.tokens
        assert entry["bits_per_byte"] == pytest.approx(result.bits_per_byte, rel=1e-6)
        row = next(line for line in out.splitlines() if line.split("│")[0].strip() == str(result.length))
        for figure in (f"{result.perplexity:.3f}", f"{result.loss:.4f}", f"{result.tokens:,}", f"{result.windows}"):
            assert figure in row
    assert record["results"][2]["loss"] is None
    assert "Skipped: length 5,000 needs that many tokens, and the text has 522." in out
    assert record["meaning"] == MEANING["full-window"]
    assert record["settings"]["protocol"] == "full-window"
    assert record["data"]["tokens"] == 522
    assert record["data"]["documents"] == 2
    assert record["model"] == _model().config.to_dict()
    assert record["device"] == "cpu"
    assert record["dtype"] == "float32"
    assert len(record["weights_sha256"]) == len(record["data"]["tokens_sha256"]) == 64


def test_prepared_data_give_the_figures_of_their_text(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    prepare([folder / "text"], folder / "shards", ByteTokenizer())
    for data in ("text", "shards"):
        assert _run(folder, "--lengths=16,64", "--protocol=prefix", "--json", f"{folder}/{data}.json", data=data) == 0
    text, shards = (json.loads((folder / f"{name}.json").read_text()) for name in ("text", "shards"))
    assert text["results"] == shards["results"]
    assert text["results"][1]["windows"] == 2
    assert text["data"]["tokenizer"] == shards["data"]["tokenizer"]


def test_of_prepared_splits_the_held_out_one_is_read(folder: Path) -> None:
    prepare([folder / "text" / "a.txt"], folder / "shards", ByteTokenizer(), val_fraction=0.25)
    assert _run(folder, "--lengths=16", "--json", f"{folder}/out.json", data="shards") == 0
    assert json.loads((folder / "out.json").read_text())["data"]["paths"] == [str(folder / "shards" / "val")]


@pytest.mark.parametrize("columns", [40, 60, 120])
@pytest.mark.parametrize("protocol", ["full-window", "prefix", "last-stride", "stream", "sliding-window"])
def test_every_protocol_fits_the_terminal(
    folder: Path, protocol: str, columns: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("COLUMNS", str(columns))
    monkeypatch.chdir(folder)
    window = ["--window=12"] if protocol == "sliding-window" else []
    argv = ["eval", "perplexity", "model", "--data", "text", "--device=cpu", "--lengths=16,64,5000"]
    assert main([*argv, f"--protocol={protocol}", *window]) == 0
    out = capsys.readouterr().out
    assert protocol in out
    assert max(map(len, out.splitlines())) <= columns
    assert "…" not in out  # nothing is cut off
    assert ("16-64" in out) == (protocol == "stream")
    assert ("bits/byte" in out) == (columns == 120)


def test_sliding_window_takes_the_trained_length(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert _run(folder, "--protocol=sliding-window", "--lengths=64") == 2
    assert "does not tell the length it was trained on: give it with --window N." in _error(capsys)
    prepare([folder / "text"], folder / "shards", ByteTokenizer())
    recipe = {
        "model": {"name": "samba-tiny", "overrides": {"d_model": 16}},
        "data": {"train": str(folder / "shards")},
        "train": {"out": str(folder / "model-run"), "steps": 1, "batch_size": 1, "length": 24},
    }
    train(Recipe.from_dict(recipe))
    argv = ["eval", "perplexity", str(folder / "model-run"), "--data", str(folder / "text"), "--device=cpu"]
    assert main([*argv, "--protocol=sliding-window", "--lengths=64", "--json", str(folder / "out.json")]) == 0
    record = json.loads((folder / "out.json").read_text())
    assert record["settings"]["window"] == 24
    assert record["settings"]["stride"] == 12
    assert record["checkpoint"].endswith("step-00000001")


def test_numbers_that_are_not_finite_are_shown_then_told(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    broken = _model()
    torch.nn.init.constant_(broken.norm.weight, math.nan)
    save(broken, folder / "model", ByteTokenizer())
    assert _run(folder, "--lengths=16,64", "--json", str(folder / "out.json")) == 2
    told = capsys.readouterr()
    assert "Not finite: at length 64" in told.out
    assert told.err.startswith("samba-lm: error: At length 16 the loss is not finite in 32 of 32 window(s)")
    assert [entry["loss"] for entry in json.loads((folder / "out.json").read_text())["results"]] == [None, None]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--lengths", "16,x"], "--lengths = 16,x: expected whole numbers with commas between"),
        (["--lengths", "1"], "lengths are [1]: give at least one, each of 2 tokens or more."),
        (["--lengths", "1000"], "The text has 522 tokens, fewer than the shortest length, 1000"),
        (["--protocol", "prefixes"], "Did you mean 'prefix'?"),
        (["--stride", "0"], "stride is 0: it must be at least 1."),
        (["--batch", "0"], "batch is 0: it must be at least 1."),
        (["--window", "8"], "window is 8, but full-window has none: leave it out, or use sliding-window."),
        (["--lenghts", "8"], "Unknown option '--lenghts'. Did you mean '--lengths'?"),
        (["--device", "gpu"], "Unknown device 'gpu'"),
    ],
)
def test_mistakes(folder: Path, options: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert _run(folder, *options) == 2
    assert message in _error(capsys)


def test_data_that_cannot_be_measured(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert _run(folder, data="nowhere") == 2
    assert "nowhere does not exist" in _error(capsys)
    (folder / "latin.txt").write_bytes(TEXT.encode() + b"caf\xe9\n")
    assert _run(folder, data="latin.txt") == 2
    assert "byte 423" in _error(capsys)
    assert _run(folder, "--errors=replace", "--lengths=64", data="latin.txt") == 0
    capsys.readouterr()
    (folder / "blank.txt").write_text(" \n")
    assert _run(folder, data="blank.txt") == 2
    assert "hold only white space" in _error(capsys)
    prepare([folder / "text"], folder / "bpe", BpeSpec(257))
    assert _run(folder, "--lengths=16", data="bpe") == 2
    assert "was made with another tokenizer than the checkpoint's" in _error(capsys)
    argv = ["eval", "perplexity", str(folder / "model"), "--data", str(folder / "bpe"), str(folder / "text")]
    assert main(argv) == 2
    assert "is prepared data, and 1 more were given" in _error(capsys)


def test_a_checkpoint_without_tokenizer_reads_only_prepared_data(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    save(_model(), folder / "bare")
    argv = ["eval", "perplexity", str(folder / "bare"), "--device=cpu", "--lengths=16", "--data"]
    assert main([*argv, str(folder / "text")]) == 2
    assert "has no tokenizer to read text with" in _error(capsys)
    prepare([folder / "text"], folder / "shards", ByteTokenizer())
    assert main([*argv, str(folder / "shards")]) == 0


def test_help_says_what_each_protocol_measures(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        main(["eval", "perplexity", "--help"])
    assert stop.value.code == 0
    out = " ".join(capsys.readouterr().out.split())
    for name, meaning in MEANING.items():
        assert f"{name}: {meaning}" in out
