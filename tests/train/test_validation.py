"""Validation shared out among processes: as many batches on each, every token once, the mean of one process."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from ranks import on_ranks

from samba_lm.checkpoint import create
from samba_lm.config import Attention, Mamba, ModelConfig, SwiGLU
from samba_lm.data.shards import ShardWriter, TokenDataset
from samba_lm.loss import IGNORE_INDEX
from samba_lm.tokenizer import ByteTokenizer
from samba_lm.train.parallel import connect
from samba_lm.train.prepare import prepare_model
from samba_lm.train.recipe import TrainSection
from samba_lm.train.step import batch_loss, evaluate
from samba_lm.train.validation import ValidationWindows

LENGTH = 16
CONFIG = ModelConfig(
    name="v", d_model=16, vocab_size=257, layers=(Mamba(state=4), SwiGLU(width=24), Attention(heads=2, window=8))
)


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> TokenDataset:
    folder = tmp_path_factory.mktemp("val")
    rng = np.random.default_rng(0)
    with ShardWriter(folder, ByteTokenizer(), shard_tokens=100) as writer:
        for length in rng.integers(1, 40, 13):
            writer.append(rng.integers(0, 256, length), end=True)
        writer.close()
    return TokenDataset.open(folder)


@pytest.mark.parametrize("documents", [False, True])
@pytest.mark.parametrize(
    ("sequences", "rows", "world"), [(1000, 4, 1), (1000, 4, 2), (7, 2, 4), (7, 4, 3), (5, 1, 4), (2, 4, 8), (8, 2, 4)]
)
def test_shares_of_uneven_data(dataset: TokenDataset, sequences: int, rows: int, world: int, documents: bool) -> None:
    whole = ValidationWindows(dataset, sequences, rows, LENGTH, documents)
    shares = [ValidationWindows(dataset, sequences, rows, LENGTH, documents, rank=r, world=world) for r in range(world)]
    sizes = [[batch.input_ids.shape for batch in share] for share in shares]
    assert all(each == sizes[0] for each in sizes), "all processes make batches of the same number and size"
    assert sum(size[0] for size in sizes[0]) == -(-whole.sequences // world)

    def rows_that_count(windows: ValidationWindows) -> list[tuple[list[int], list[int]]]:
        return [
            (ids.tolist(), targets.tolist())
            for batch in windows
            for ids, targets in zip(batch.input_ids, batch.targets, strict=True)
            if (targets != IGNORE_INDEX).any()
        ]

    assert sorted(row for share in shares for row in rows_that_count(share)) == sorted(rows_that_count(whole))
    model = create(CONFIG).double()
    with torch.no_grad():
        losses = [[batch_loss_of(model, batch) for batch in share] for share in (whole, *shares)]
    together = [each for share in losses[1:] for each in share]
    (total, count), (parts, counted) = (map(sum, zip(*found, strict=True)) for found in (losses[0], together))
    assert counted == count
    assert parts / counted == pytest.approx(total / count, rel=1e-12)


def shared_out(folder: str) -> list[float]:
    """The mean losses of some validations, of a model that is sharded among the processes there are."""
    parallel = connect("cpu")
    model = create(CONFIG)
    prepare_model(model, TrainSection(batch_size=6, length=LENGTH), parallel)
    windows = [
        ValidationWindows(
            TokenDataset.open(folder), sequences, 2, LENGTH, True, rank=parallel.data_rank, world=parallel.data_world
        )
        for sequences in (1, 2, 7, 10)
    ]
    losses = [evaluate(model, batches, parallel) for batches in windows]
    parallel.close()
    return losses


def test_a_model_in_shards_never_waits_in_vain(dataset: TokenDataset) -> None:
    """3 processes, and fewer windows than that, or a number that they do not divide."""
    wanted = shared_out(str(dataset.folder))
    for got in on_ranks(3, shared_out, str(dataset.folder), timeout=60):
        assert got == pytest.approx(wanted, rel=1e-6)


def batch_loss_of(model: torch.nn.Module, batch: object) -> tuple[float, int]:
    loss, valid = batch_loss(model, batch, torch.device("cpu"))
    return loss.item(), int(valid)


def test_one_process_reads_what_it_always_did(dataset: TokenDataset) -> None:
    batches = list(ValidationWindows(dataset, 6, 4, LENGTH))
    assert [batch.input_ids.shape[0] for batch in batches] == [4, 2]
    stream = dataset.tokens(0, 6 * LENGTH).reshape(6, LENGTH)
    assert torch.cat([batch.input_ids for batch in batches]).tolist() == stream.tolist()
    assert (torch.cat([batch.targets for batch in batches]) != IGNORE_INDEX).all()


def test_bytes_read(dataset: TokenDataset, tmp_path: Path) -> None:
    shards = dataset.meta.shards
    some = ValidationWindows(dataset, 1, 4, LENGTH)
    assert some.bytes_read() == shards[0].tokens_bytes
    every = ValidationWindows(dataset, 10**6, 4, LENGTH, documents=True)
    assert every.bytes_read() == sum(shard.tokens_bytes + shard.offsets_bytes for shard in shards)
