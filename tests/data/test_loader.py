from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from samba_lm.data.loader import Batch, Loader, num_windows, read_windows
from samba_lm.data.shards import ShardWriter, TokenDataset
from samba_lm.errors import UserError
from samba_lm.loss import IGNORE_INDEX
from samba_lm.tokenizer import ByteTokenizer

LENGTHS = [9, 1, 30, 4, 4, 17, 60, 2, 1, 1, 40]


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> TokenDataset:
    folder = tmp_path_factory.mktemp("data")
    rng = np.random.default_rng(0)
    with ShardWriter(folder, ByteTokenizer(), shard_tokens=50) as writer:
        for length in LENGTHS:
            writer.append(rng.integers(0, 256, length), end=True)
        writer.close()
    dataset = TokenDataset.open(folder)
    assert len(dataset.meta.shards) > 2
    return dataset


@pytest.fixture(scope="module")
def stream(dataset: TokenDataset) -> np.ndarray:
    return dataset.tokens(0, dataset.num_tokens)


def rows_of(batch: Batch) -> list[list[int]]:
    return [row.tolist() for row in batch.input_ids]


def test_targets_are_the_next_tokens(dataset: TokenDataset, stream: np.ndarray) -> None:
    loader = Loader(dataset, batch_size=4, length=8, seed=1)
    windows = {tuple(stream[i * 8 : i * 8 + 8]): i for i in range(loader.rows)}
    for step in range(10):
        batch = loader.batch(step)
        assert batch.segments is None
        for tensor in (batch.input_ids, batch.targets):
            assert tensor.shape == (4, 8)
            assert tensor.dtype == torch.int64
        for inputs, targets in zip(batch.input_ids, batch.targets, strict=True):
            start = windows[tuple(inputs.tolist())] * 8
            assert targets.tolist() == stream[start + 1 : start + 9].tolist()


@pytest.mark.parametrize(("batch_size", "length"), [(1, 7), (4, 8), (5, 3), (64, 16), (3, 179)])
def test_each_epoch_reads_every_window_once(
    dataset: TokenDataset, stream: np.ndarray, batch_size: int, length: int
) -> None:
    loader = Loader(dataset, batch_size, length, seed=3)
    count = loader.rows
    assert count == (len(stream) - 1) // length
    epochs = 4
    steps = -(-epochs * count // batch_size)
    rows = [row for step in range(steps) for row in rows_of(loader.batch(step))]
    expected = sorted(stream[: count * length].reshape(count, length).tolist())
    orders = []
    for epoch in range(epochs):
        read = rows[epoch * count : (epoch + 1) * count]
        assert sorted(read) == expected
        orders.append(read)
    if count > 10:
        assert orders[0] != orders[1]
        assert orders[0] != expected


def test_a_batch_is_a_function_of_seed_and_step(dataset: TokenDataset) -> None:
    first = Loader(dataset, 4, 8, seed=5)
    forward = [rows_of(first.batch(step)) for step in range(30)]
    second = Loader(TokenDataset.open(dataset.folder), 4, 8, seed=5)
    assert [rows_of(second.batch(step)) for step in reversed(range(30))] == forward[::-1]
    assert rows_of(Loader(dataset, 4, 8, seed=6).batch(0)) != forward[0]


def test_order_is_pinned(dataset: TokenDataset, stream: np.ndarray) -> None:
    # A change of these numbers is a change of every run that resumes: it must not come by accident.
    rows = rows_of(Loader(dataset, 6, 8, seed=7).batch(0))
    windows = stream[:176].reshape(22, 8).tolist()
    assert [windows.index(row) for row in rows] == [19, 7, 14, 9, 16, 0]


@pytest.mark.parametrize("documents", [False, True])
@pytest.mark.parametrize("world", [1, 2, 3, 6])
def test_ranks_slice_one_global_batch(dataset: TokenDataset, world: int, documents: bool) -> None:
    loader = Loader(dataset, 6, 8, seed=0, documents=documents)
    for step in (0, 3, 17):
        whole = loader.batch(step)
        parts = [loader.batch(step, rank, world) for rank in range(world)]
        assert torch.equal(torch.cat([part.input_ids for part in parts]), whole.input_ids)
        assert torch.equal(torch.cat([part.targets for part in parts]), whole.targets)
        if whole.segments is not None:
            segments = [part.segments for part in parts if part.segments is not None]
            assert torch.equal(torch.cat(segments), whole.segments)


@pytest.mark.parametrize("length", [1, 5, 8, 64, 179])
def test_documents(dataset: TokenDataset, stream: np.ndarray, length: int) -> None:
    document_of = np.repeat(np.arange(len(LENGTHS)), [n + 1 for n in LENGTHS])
    windows = range(num_windows(dataset, length))
    batch = read_windows(dataset, windows, length, documents=True)
    assert batch.segments is not None
    assert batch.segments.dtype == torch.int64
    for i in windows:
        span = slice(i * length, (i + 1) * length)
        assert batch.input_ids[i].tolist() == stream[span].tolist()
        assert batch.segments[i].tolist() == (document_of[span] - document_of[span.start]).tolist()
        following = np.where(stream[span] == 256, IGNORE_INDEX, stream[span.start + 1 : span.stop + 1])
        assert batch.targets[i].tolist() == following.tolist()
    assert (batch.targets == IGNORE_INDEX).any()


def test_batches_are_not_views_of_the_files(dataset: TokenDataset) -> None:
    loader = Loader(dataset, 2, 8, seed=0, documents=True)
    before = loader.batch(0)
    kept = before.input_ids.clone()
    before.input_ids.zero_()
    before.targets.zero_()
    assert torch.equal(loader.batch(0).input_ids, kept)


def test_too_short(dataset: TokenDataset) -> None:
    tokens = dataset.num_tokens
    assert Loader(dataset, 1, tokens - 1, seed=0).batch(5).input_ids.shape == (1, tokens - 1)
    with pytest.raises(UserError, match=rf"has {tokens} tokens, fewer than one row of length {tokens} needs"):
        Loader(dataset, 1, tokens, seed=0)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"batch_size": 0}, "batch_size is 0"),
        ({"length": 0}, "sequence length is 0"),
        ({"seed": -1}, "seed is -1"),
        ({"seed": 2**32}, "seed is 4294967296"),
    ],
)
def test_bad_sizes(dataset: TokenDataset, options: dict[str, int], words: str) -> None:
    with pytest.raises(UserError, match=words):
        Loader(dataset, **{"batch_size": 1, "length": 8, "seed": 0, **options})


def test_batch_that_does_not_divide(dataset: TokenDataset) -> None:
    with pytest.raises(UserError, match="batch_size 6 does not divide among 4 processes"):
        Loader(dataset, 6, 8, seed=0).batch(0, rank=1, world=4)


def test_only_the_loader_imports_torch(tmp_path: Path) -> None:
    import subprocess
    import sys

    program = "import sys, samba_lm.data.prepare, samba_lm.cli.data; sys.exit('torch' in sys.modules)"
    subprocess.run([sys.executable, "-c", program], check=True, cwd=tmp_path)
