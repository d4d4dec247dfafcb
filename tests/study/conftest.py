"""A tiny real study: three architectures of some thousand parameters, on made-up text, for some steps."""

from __future__ import annotations

import random
from pathlib import Path

import pytest

from samba_lm.data.shards import ShardWriter
from samba_lm.tokenizer import ByteTokenizer

BASE = """
[model]
overrides = {{d_model = 16}}
[data]
train = "{data}/train"
val = "{data}/val"
[train]
steps = 12
batch_size = 2
length = 32
lr = 4e-3
eval_every = 6
eval_batches = 2
save_every = 0
device = "cpu"
"""
RECIPE = 'base = "base.toml"\n[model]\nname = "{name}-micro"\n'
STUDY = """
title = "Three"
reference = "samba"

[sweep]
lrs = [1e-3, 4e-3]
budget = 0.5

[[evaluations]]
name = "windows"
title = "Windows of held-out text"
data = "{data}/val"
lengths = [32, 64, 128]
max_length_growing = 64

[[runs]]
name = "samba"
title = "Samba"
recipe = "samba.toml"
groups = ["Table 3"]
seeds = [0, 1]
keep = true

[[runs]]
name = "llama"
recipe = "llama.toml"
groups = ["Table 3", "Beside"]
lr = 4e-3

[[runs]]
name = "mamba"
recipe = "mamba.toml"
groups = ["Table 3"]
lr_from = "samba"

[[paper]]
group = "Table 3"
source = "a table"
columns = ["size", "4K"]
evaluation = "windows"
lengths = [32]
[paper.rows]
samba = ["421M", 10.06]
llama = ["438M", 11.14]
"""


@pytest.fixture(scope="session")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the prepared data sets ``train`` and ``val``."""
    folder = tmp_path_factory.mktemp("prepared")
    tokenizer = ByteTokenizer()
    for split, documents in (("train", 12), ("val", 4)):
        words = random.Random(split)
        (folder / split).mkdir()
        with ShardWriter(folder / split, tokenizer) as writer:
            for _ in range(documents):
                text = " ".join(words.choices(["one", "two", "three", "four"], k=60))
                writer.append(tokenizer.encode(text), end=True, text_bytes=len(text))
            writer.close()
    return folder


def write_study(folder: Path, data: Path) -> Path:
    """The study's files in a new folder ``small``."""
    study = folder / "small"
    study.mkdir(parents=True)
    (study / "base.toml").write_text(BASE.format(data=data), encoding="utf-8")
    for name in ("samba", "llama", "mamba"):
        (study / f"{name}.toml").write_text(RECIPE.format(name=name), encoding="utf-8")
    (study / "study.toml").write_text(STUDY.format(data=data), encoding="utf-8")
    return study


@pytest.fixture
def study(tmp_path: Path, data: Path) -> Path:
    """The study's folder, of one test alone."""
    return write_study(tmp_path, data)
