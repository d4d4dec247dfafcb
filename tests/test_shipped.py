"""The model that comes with the package: found by its name, taken where none is named, whole where it is there."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

import samba_lm
from samba_lm import checkpoint, shipped
from samba_lm.cli.main import main
from samba_lm.data.passkey import Passkey
from samba_lm.errors import UserError
from samba_lm.mixers.mamba import Selection

REAL = shipped.FOLDER
BYTES = 15 << 20
"""What its weights may take."""


def test_it_is_fp32_in_memory_however_it_is_named(nano: Path, tmp_path: Path) -> None:
    model, tokenizer = samba_lm.load("samba-nano")
    assert {t.dtype for t in model.state_dict().values()} == {torch.float32}, "16 bits are slow on many processors"
    copy = tmp_path / "copy"
    shutil.copytree(nano, copy)
    for place in (nano, copy):
        same, _ = samba_lm.load(place)
        for name, tensor in same.state_dict().items():
            assert torch.equal(tensor, model.state_dict()[name]), (
                "a checkpoint's numbers do not hang on how it is named"
            )
    copy = tmp_path / "saved"
    samba_lm.save(samba_lm.load(nano, dtype=torch.bfloat16)[0], copy)
    assert samba_lm.load(copy)[0].dtype == torch.bfloat16, "what names no dtype stays as it is"
    header = json.loads((copy / "config.json").read_text())
    (copy / "config.json").write_text(json.dumps({**header, "dtype": "float8"}))
    with pytest.raises(UserError, match="asks for dtype 'float8': it must be one of float32, bfloat16"):
        samba_lm.load(copy)
    assert tokenizer is not None
    assert samba_lm.load("samba-nano", dtype=torch.bfloat16)[0].dtype == torch.bfloat16
    assert checkpoint.find("samba-nano") == nano
    assert checkpoint.find("samba-tiny") is None


def test_a_folder_of_that_name_is_taken_first(nano: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    samba_lm.save(samba_lm.create("samba-tiny"), "samba-nano", samba_lm.ByteTokenizer())
    assert samba_lm.load("samba-nano")[0].config.name == "samba-tiny"
    assert shipped.find("samba-nano") is None


def test_an_installation_without_it_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shipped, "FOLDER", tmp_path)
    with pytest.raises(UserError, match="does not bring samba-nano"):
        samba_lm.load("samba-nano")
    with pytest.raises(UserError, match="no folder 'samba-nono'"):
        samba_lm.load("samba-nono")


def written(capsys: pytest.CaptureFixture[str], *words: str) -> tuple[str, str]:
    assert main(list(words)) == 0
    told = capsys.readouterr()
    return told.out, told.err


def test_commands_take_it_where_none_is_named(
    nano: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    few = ["--max-tokens", "5", "--temperature", "0"]
    model, tokenizer = samba_lm.load("samba-nano")
    text = samba_lm.generate(model, tokenizer, "Once upon a time", max_tokens=5, temperature=0) + "\n"
    for words in (
        ["Once upon a time"],
        ["--prompt", "Once upon a time"],
        ["samba-nano", "Once upon a time"],
        ["samba-nano", "--prompt", "Once upon a time"],
        [str(nano), "Once upon a time", "--dtype", "float32"],
    ):
        assert written(capsys, "generate", *words, *few)[0] == text, words
    answer, err = written(capsys, "ask", "Who was it? It was", *few)
    assert (
        answer.rstrip()
        == samba_lm.generate(model, tokenizer, "Who was it? It was", max_tokens=5, temperature=0, stop="\n").strip()
    )
    assert "samba-nano is a small base model: it continues texts" in err
    answer, _ = written(capsys, "ask", "Who was it?", *few)
    prompt = "Who was it? The answer is"
    assert (
        answer.rstrip() == samba_lm.generate(model, tokenizer, prompt, max_tokens=5, temperature=0, stop="\n").strip()
    )
    assert "base model" not in written(capsys, "ask", str(nano), "Who was it?", *few)[1]

    book = tmp_path / "book.txt"
    book.write_text("A text. " * 50)
    written(capsys, "context", "save", "--from", str(book), "--out", "book.ctx")
    assert written(capsys, "ask", "--context", "book.ctx", "Who was it? It was", *few)[0]


def test_it_is_trained_on_by_name(
    nano: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "recipe.toml").write_text(
        '[model]\ninit_from = "samba-nano"\n[data]\npasskey = {}\n'
        '[train]\nout = "tuned"\nsteps = 1\nbatch_size = 1\nlength = 300\nlr = 1e-3\n'
    )
    written(capsys, "train", "recipe.toml")
    tuned, tokenizer = samba_lm.load("tuned")
    before, _ = samba_lm.load("samba-nano")
    assert tokenizer is not None
    assert tuned.config.layers == before.config.layers
    assert 0 < (tuned.embedding - before.embedding).abs().max() < 0.01, "one step from there"


def test_a_word_alone_is_a_checkpoint_or_a_mistake(
    nano: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["generate", "runs/frist"]) == 2
    err = capsys.readouterr().err
    assert "'runs/frist' is no checkpoint" in err
    assert "--prompt runs/frist" in err
    assert main(["ask", "samba-nano"]) == 2
    assert "there is no question" in capsys.readouterr().err
    assert main(["ask"]) == 2
    assert "There is no question" in capsys.readouterr().err
    (tmp_path / "my run").mkdir()
    assert main(["generate", "my run"]) == 2
    assert "my run is not a checkpoint" in capsys.readouterr().err, "a folder that is there is never a prompt"


@pytest.mark.skipif(not (REAL / shipped.DEFAULT).exists(), reason="this checkout has no trained model")
def test_what_is_shipped_is_whole_and_small() -> None:
    assert shipped.names() == [shipped.DEFAULT]
    folder = REAL / shipped.DEFAULT
    assert {p.name for p in folder.iterdir()} <= {
        "config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json", "README.md"
    }  # fmt: skip
    assert (folder / "model.safetensors").stat().st_size <= BYTES
    assert checkpoint.memory_dtype(folder) == torch.float32
    model, tokenizer = samba_lm.load(folder, dtype=torch.bfloat16)
    kept = checkpoint.read_weights(folder, model.config)
    assert all(torch.equal(kept[name], tensor) for name, tensor in model.state_dict().items()), "16 bits in the file"
    for module in model.modules():
        if isinstance(module, Selection):
            assert {p.dtype for p in module.parameters()} == {torch.float32}, "how long a channel remembers"
    assert all(bool(t.isfinite().all()) for t in model.state_dict().values())
    assert json.loads((folder / "config.json").read_text())["tokenizer"] == tokenizer.fingerprint()
    model, tokenizer = samba_lm.load(shipped.DEFAULT)
    text = samba_lm.generate(model, tokenizer, "Once upon a time, there was", max_tokens=60, temperature=0.8)
    assert len(re.findall(r"[a-z]+", text)) > 20, text
    random = np.random.RandomState(0)
    example = Passkey(tokenizer).example(random, 4096, 0.3)
    found = samba_lm.generate(
        model, tokenizer, np.concatenate((example.document, example.question)), max_tokens=8, temperature=0
    )
    assert found.split()[0] == example.text, "a number 2,800 tokens back, far beyond its windows"
    card = (folder / "README.md").read_text(encoding="utf-8").lower()
    for word in ("licence", "data", "recipe", "base model", "passkey", "perplexity"):
        assert word in card, f"the card does not tell of {word}"
