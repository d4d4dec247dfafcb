"""What tells one model's results from another's in an `eval` command's file."""

from __future__ import annotations

from pathlib import Path

from safetensors.torch import load_file, save_file

from samba_lm.checkpoint import create, load, save
from samba_lm.cli.eval import about
from samba_lm.config import Attention, Mamba, ModelConfig
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
