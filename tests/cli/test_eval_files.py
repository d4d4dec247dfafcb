"""What tells one model's results from another's in an `eval` command's file."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from samba_lm.checkpoint import create, load, save
from samba_lm.cli.eval import about
from samba_lm.cli.main import main
from samba_lm.config import Attention, Mamba, ModelConfig
from samba_lm.convert.peft import save_adapter
from samba_lm.nn.lora import LoraSettings, adapters, attach, reset_adapters
from samba_lm.tokenizer import ByteTokenizer

CONFIG = ModelConfig(name="tiny", d_model=16, vocab_size=257, layers=(Mamba(state=4), Attention(heads=2, window=8)))


def test_weights_in_several_files_are_told_apart_too(tmp_path: Path) -> None:
    """A training over several processes leaves such folders: another step of it is another model."""
    folders = []
    for seed in (0, 1):
        folder = tmp_path / f"step-{seed}"
        save(create(CONFIG, seed=seed), folder, ByteTokenizer())
        tensors = load_file(folder / "model.safetensors")
        (folder / "model.safetensors").unlink()
        names = sorted(tensors)
        for i, some in enumerate((names[::2], names[1::2])):
            save_file({name: tensors[name] for name in some}, folder / f"model-{i + 1:05}-of-00002.safetensors")
        folders.append(str(folder))
    first, second = (about(folder, *load(folder)) for folder in folders)
    assert first["weights_sha256"] != second["weights_sha256"]
    assert len(str(first["weights_sha256"])) == 64


def _adapter(folder: Path, seed: int) -> None:
    model = create(CONFIG, seed=0)
    attach(model, LoraSettings(2, 8.0))
    reset_adapters(model, seed=seed)
    for _, module in adapters(model):
        torch.nn.init.normal_(module.lora_B, generator=torch.Generator().manual_seed(seed))
    save_adapter(model, folder, "base", ByteTokenizer())


def test_an_adapter_makes_another_model(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """What was measured without it, or with another, is never told of it."""
    monkeypatch.chdir(tmp_path)
    save(create(CONFIG, seed=0), "base", ByteTokenizer())
    Path("text.txt").write_text("The sea was calm. " * 20)
    for seed in (1, 2):
        _adapter(tmp_path / f"adapter-{seed}", seed)
    words = ["eval", "perplexity", "base", "--data=text.txt", "--lengths=64", "--device=cpu", "--json=out.json"]
    assert main(words) == 0
    old = json.loads(Path("out.json").read_text())
    for fact in ("adapter", "adapter_sha256"):  # as in files of before
        assert old["models"][0].pop(fact) is None
    Path("out.json").write_text(json.dumps(old))
    assert main([*words, "--adapter=adapter-1"]) == 0
    assert main([*words, "--adapter=adapter-2"]) == 0
    assert main(words) == 0
    models = json.loads(Path("out.json").read_text())["models"]
    assert [model.get("adapter") for model in models] == [None, "adapter-1", "adapter-2"]
    assert len({model["adapter_sha256"] for model in models}) == 3
    assert len({model["results"][0]["loss"] for model in models}) == 3
    assert models[0]["results"] == old["models"][0]["results"]
    assert capsys.readouterr().err == ""
