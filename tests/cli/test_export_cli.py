"""``samba-lm export``: one model's folder, from whatever holds it."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch

import samba_lm
from samba_lm import checkpoint
from samba_lm.cli.main import main
from samba_lm.convert import export as module
from samba_lm.errors import UserError
from samba_lm.tensor_files import Piece, TensorFiles, write_pieces
from samba_lm.tokenizer import ByteTokenizer


def step(run: Path, number: int, files: int = 1) -> Path:
    """A step's folder of a made-up run, its weights in so many files."""
    folder = run / f"step-{number:08d}"
    samba_lm.save(samba_lm.create("samba-micro", seed=number), folder, ByteTokenizer())
    if files > 1:
        whole = TensorFiles([folder / "model.safetensors"])
        for rank in range(files):
            pieces = []
            for name in whole.names():
                rows = whole.read(name).tensor_split(files)
                before = sum(len(part) for part in rows[:rank])
                part = rows[rank]
                if part.numel():
                    at = (before, *(0,) * (part.ndim - 1))
                    pieces.append(Piece(name, part.dtype, tuple(part.shape), at, lambda part=part: part))
            write_pieces(folder / f"model-{rank:05d}.safetensors", pieces, whole.metadata, sharded=True)
        (folder / "model.safetensors").unlink()
    (folder / "trainer.json").write_text("{}")
    return folder


def weights(folder: Path, dtype: torch.dtype | None = None) -> dict[str, torch.Tensor]:
    return samba_lm.load(folder, dtype=dtype)[0].state_dict()


@pytest.mark.parametrize("files", [1, 3])
def test_a_run_becomes_a_model(tmp_path: Path, files: int, capsys: pytest.CaptureFixture[str]) -> None:
    run = tmp_path / "run"
    old, new = step(run, 9, files), step(run, 10, files)
    out, record = tmp_path / "out", tmp_path / "out.json"
    assert main(["export", str(run), str(out), "--json", str(record)]) == 0
    assert f"From {new}." in capsys.readouterr().out
    assert {path.name for path in out.iterdir()} == {
        *("config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json")
    }
    seeded = samba_lm.create("samba-micro", seed=10).state_dict()
    assert all(torch.equal(tensor, seeded[name]) for name, tensor in weights(out).items())
    assert json.loads(record.read_text())["weights_bytes"] == (out / "model.safetensors").stat().st_size
    # Another one takes its place, in other numbers; the recurrence keeps its own.
    assert main(["export", str(run), str(out), "--step", "9", "--dtype", "bfloat16"]) == 0
    want = weights(old, torch.bfloat16)
    got = weights(out)
    assert all(torch.equal(tensor, want[name]) and tensor.dtype == want[name].dtype for name, tensor in got.items())
    assert {tensor.dtype for tensor in got.values()} == {torch.float32, torch.bfloat16}


def test_mistakes_are_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run, out = tmp_path / "run", str(tmp_path / "out")
    folder = step(run, 9, 2)
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "letter").touch()
    for words, told in (
        ([str(tmp_path / "none"), out], "There is no folder"),
        ([str(run), out, "--step", "10"], "no checkpoint of step 10. Known: 9."),
        ([str(folder), out, "--step", "9"], "Is it a run's folder?"),
        ([str(run), str(tmp_path / "mine")], "is not a samba-lm checkpoint"),
        ([str(run), str(folder)], "also holds"),
        ([str(run), str(folder / "config.json")], "is not a samba-lm checkpoint"),
    ):
        assert main(["export", *words]) == 2
        assert told in capsys.readouterr().err
    (folder / "model-00001.safetensors").unlink()
    assert main(["export", str(run), out]) == 2
    assert "damaged" in capsys.readouterr().err
    assert not Path(out).exists()


def test_a_step_that_the_run_deletes_meanwhile(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The newest of a moment ago is gone: the newest of now is taken."""
    first, find = step(tmp_path / "run", 1), module._find

    def and_then_deleted(source: Path, number: int | None) -> Path:
        found = find(source, number)
        if found == first:
            step(tmp_path / "run", 2)
            shutil.rmtree(first)
        return found

    monkeypatch.setattr(module, "_find", and_then_deleted)
    assert module.export(tmp_path / "run", tmp_path / "out").source.name == "step-00000002"
    with pytest.raises(UserError, match="no checkpoint of step 1"):
        module.export(tmp_path / "run", tmp_path / "out", step=1)
    assert checkpoint.read_config(tmp_path / "out")[0].name == "samba-micro"
