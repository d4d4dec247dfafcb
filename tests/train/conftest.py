"""A tiny real run: bytes of made-up text, samba-micro cut small, a few steps."""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from samba_lm.data.shards import ShardWriter
from samba_lm.tokenizer import ByteTokenizer
from samba_lm.train.recipe import Recipe
from samba_lm.train.run import train


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


def tiny_recipe(data: Path, out: Path, **train: Any) -> Recipe:
    """Six steps of samba-micro on ``data``/train into ``out``, with other [train] fields replaced."""
    return Recipe.from_dict(
        {
            "model": {"name": "samba-micro"},
            "data": {"train": str(data / "train"), "val": str(data / "val"), "documents": True},
            "train": {
                "out": str(out),
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


@pytest.fixture(scope="session")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with data sets ``train`` and ``val``."""
    folder = tmp_path_factory.mktemp("prepared") / "data"
    write_data(folder / "train", seed=1)
    write_data(folder / "val", seed=2, documents=4)
    return folder


@pytest.fixture
def recipe(data: Path, tmp_path: Path) -> Callable[..., Recipe]:
    """``recipe("a", lr=1.0)``: the tiny recipe, into tmp_path/a."""

    def make(out: str = "run", **train: Any) -> Recipe:
        return tiny_recipe(data, tmp_path / out, **train)

    return make


@pytest.fixture(scope="session")
def whole_run(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of an uninterrupted tiny run; look, do not touch."""
    return train(tiny_recipe(data, tmp_path_factory.mktemp("whole") / "whole")).folder.parent
