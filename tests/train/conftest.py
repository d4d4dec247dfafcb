"""A tiny real run: bytes of made-up text, samba-nano cut small, a few steps."""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from samba_lm.data.shards import ShardWriter
from samba_lm.tokenizer import ByteTokenizer
from samba_lm.train.recipe import Recipe


def write_data(folder: Path, seed: int, documents: int = 12) -> Path:
    """Prepared data: some documents of random words, in bytes."""
    words = random.Random(seed)
    folder.mkdir(parents=True)
    tokenizer = ByteTokenizer()
    with ShardWriter(folder, tokenizer) as writer:
        for _ in range(documents):
            text = " ".join(words.choice(["one", "two", "three", "four", "five"]) for _ in range(words.randint(20, 90)))
            writer.append(tokenizer.encode(text), end=True, text_bytes=len(text))
        writer.close()
    return folder


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """A folder with data sets ``train`` and ``val``."""
    write_data(tmp_path / "data" / "train", seed=1)
    write_data(tmp_path / "data" / "val", seed=2, documents=4)
    return tmp_path / "data"


@pytest.fixture
def recipe(data: Path, tmp_path: Path) -> Callable[..., Recipe]:
    """``recipe(out="a", lr=1.0)``: a run of six steps into tmp_path/out, with other [train] fields replaced."""

    def make(out: str = "run", **train: Any) -> Recipe:
        return Recipe.from_dict(
            {
                "model": {"name": "samba-nano"},
                "data": {"train": str(data / "train"), "val": str(data / "val"), "documents": True},
                "train": {
                    "out": str(tmp_path / out),
                    "steps": 6,
                    "batch_size": 4,
                    "length": 32,
                    "lr": 3e-3,
                    "warmup_fraction": 0.3,
                    "eval_every": 2,
                    "eval_batches": 2,
                    "save_every": 2,
                    "log_every": 1,
                    "device": "cpu",
                    **train,
                },
            }
        )

    return make
