"""``samba-lm convert`` from the command line: the reference's weights give the reference's logits."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import samba_lm
from samba_lm.cli.main import main
from samba_lm.convert.transformers import to_transformers
from samba_lm.tokenizer import ByteTokenizer

GOLDEN = Path(__file__).parents[1] / "golden"
MANIFEST: dict[str, Any] = json.loads((GOLDEN / "manifest.json").read_text())


def _write_config(folder: Path, arch: str, **fields: Any) -> Path:
    entry = MANIFEST["archs"][arch]
    path = folder / "config.json"
    path.write_text(json.dumps({**entry["config"], "size_overrides": entry["size_overrides"], **fields}))
    return path


def _convert(*argv: object) -> int:
    return main(["convert", *map(str, argv)])


def _told(capsys: pytest.CaptureFixture[str], *argv: object) -> str:
    """What a command that must fail says, in one line."""
    assert _convert(*argv) == 2
    told = capsys.readouterr()
    assert told.out == ""
    assert told.err.count("\n") == 1, told.err
    assert told.err.startswith("samba-lm: error: ")
    return told.err


@pytest.mark.parametrize("arch", MANIFEST["archs"])
@pytest.mark.parametrize("suffix", ["safetensors", "pth"])
@torch.no_grad()
def test_from_official(arch: str, suffix: str, tmp_path: Path) -> None:
    golden = load_file(GOLDEN / f"{arch}.safetensors")
    weights = GOLDEN / f"{arch}.safetensors"
    if suffix == "pth":
        weights = tmp_path / "weights.pth"
        bare = {name.removeprefix("param."): t for name, t in golden.items() if name.startswith("param.")}
        torch.save({"model": bare}, weights)
    config = _write_config(tmp_path, arch)
    assert _convert("from-official", weights, "--config", config, "--out", tmp_path / "out") == 0
    model, tokenizer = samba_lm.load(tmp_path / "out")
    assert tokenizer is None
    logits, _ = model(golden["input_ids"])
    torch.testing.assert_close(logits, golden["logits"], rtol=0, atol=MANIFEST["tolerances"]["logits_atol"])


def test_from_official_with_a_tokenizer(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = ("from-official", GOLDEN / "mamba.safetensors", "--config", _write_config(tmp_path, "mamba"))
    ids = {"a": 0, "b": 1, "<end>": 2}
    content = {"version": "1.0", "model": {"type": "WordLevel", "vocab": ids, "unk_token": "a"}}
    (tmp_path / "tokenizer.json").write_text(json.dumps(content))
    with_file = (*source, "--out", tmp_path / "out", "--tokenizer", tmp_path / "tokenizer.json")
    assert "name its end-of-text token" in _told(capsys, *with_file)
    assert not (tmp_path / "out").exists()
    assert _convert(*with_file, "--eos", "<end>") == 0
    _, tokenizer = samba_lm.load(tmp_path / "out")
    assert tokenizer is not None
    assert (tokenizer.vocab_size, tokenizer.eos_id) == (3, 2)
    capsys.readouterr()

    other = (*source, "--out", tmp_path / "other", "--tokenizer")
    assert "tokenizer has 257 ids but model 'tiny' has a vocabulary of 128" in _told(capsys, *other, "byte")
    assert "--tokenizer bpe:300: give the file" in _told(capsys, *other, "bpe:300")
    assert "neither byte, bpe:SIZE, nor a file" in _told(capsys, *other, tmp_path / "none.json")
    assert not (tmp_path / "other").exists()


def test_bad_input(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    weights, config, out = GOLDEN / "samba.safetensors", _write_config(tmp_path, "samba"), tmp_path / "out"

    def told(weights: Path = weights, config: Path = config, out: Path = out) -> str:
        before = sorted(path.name for path in tmp_path.iterdir())
        line = _told(capsys, "from-official", weights, "--config", config, "--out", out)
        assert sorted(path.name for path in tmp_path.iterdir()) == before  # nothing made, nothing left behind
        return line

    assert "Missing --config" in _told(capsys, "from-official", weights, "--out", out)
    assert "There is no file" in told(weights=tmp_path / "none.pth")
    assert "There is no file" in told(config=tmp_path / "none.json")
    assert "is not valid JSON" in told(config=weights)
    (tmp_path / "cut.safetensors").write_bytes(weights.read_bytes()[:5000])
    assert "is truncated" in told(weights=tmp_path / "cut.safetensors")
    assert "n_layers = 4: unknown key. Did you mean 'n_layer'?" in told(
        config=_write_config(tmp_path, "samba", n_layers=4)
    )
    assert "belong to another config" in told(config=_write_config(tmp_path, "samba", n_layer=6))
    assert "which the config has no place for" in told(config=_write_config(tmp_path, "samba", n_layer=2))
    assert "but the config needs" in told(config=_write_config(tmp_path, "samba", intermediate_size=28))
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "config.json").write_text("{}")
    assert "exists and is not a samba-lm checkpoint" in told(out=tmp_path / "mine")
    assert (tmp_path / "mine" / "config.json").read_text() == "{}"
    assert "exists and is not a samba-lm checkpoint" in told(out=tmp_path / "cut.safetensors")


@pytest.mark.parametrize("name", ["llama-micro", "swa-micro", "mamba-micro"])
@torch.no_grad()
def test_to_transformers_and_back(name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model, there, back = samba_lm.create(name, seed=3), tmp_path / "there", tmp_path / "back"
    samba_lm.save(model, tmp_path / "model", ByteTokenizer())
    assert _convert("to-transformers", tmp_path / "model", "--out", there, "--json", tmp_path / "a.json") == 0
    assert _convert("from-transformers", there, "--out", back, "--json", tmp_path / "b.json") == 0
    assert capsys.readouterr().out.count(f"{model.config.parameters():,} parameters (float32)") == 2
    loaded, tokenizer = samba_lm.load(back)
    assert isinstance(tokenizer, ByteTokenizer)
    ids = torch.randint(0, 257, (2, 200))
    assert torch.equal(loaded(ids)[0], model(ids)[0])
    records = [json.loads((tmp_path / file).read_text()) for file in ("a.json", "b.json")]
    assert [record["parameters"] for record in records] == [model.config.parameters()] * 2
    assert records[0]["tokenizer"] == records[1]["tokenizer"] == tokenizer.fingerprint()
    assert records[1]["source"] == str(there)


def test_from_transformers_replaces_checkpoints_only(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    to_transformers(samba_lm.create("mamba-micro"), tmp_path / "there")
    samba_lm.save(samba_lm.create("samba-micro"), tmp_path / "out")
    told = _told(capsys, "from-transformers", tmp_path / "there", "--out", tmp_path / "there")
    assert "exists and is not a samba-lm checkpoint" in told
    assert (tmp_path / "there" / "config.json").is_file()
    assert _convert("from-transformers", tmp_path / "there", "--out", tmp_path / "out") == 0
    assert samba_lm.load(tmp_path / "out")[0].config.name == "there"


def test_to_transformers_refuses(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    told = _told(capsys, "to-transformers", "samba-micro", "--out", tmp_path / "out")
    assert "'samba-micro' has no counterpart in transformers" in told
    assert "There is no folder" in _told(capsys, "to-transformers", tmp_path / "x", "--out", tmp_path / "out")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "a").touch()
    assert "choose another folder" in _told(capsys, "to-transformers", "swa-micro", "--out", tmp_path / "full")
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["a", "full"]
