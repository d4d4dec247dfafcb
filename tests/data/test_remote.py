"""Prepared data at URLs: fsspec's own memory and file systems stand in for object stores."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import fsspec
import numpy as np
import pytest
import torch

from samba_lm.cli.main import main
from samba_lm.data import remote
from samba_lm.data.cache import Cache
from samba_lm.data.loader import Loader
from samba_lm.data.shards import ShardWriter, TokenDataset, open_splits
from samba_lm.errors import UserError
from samba_lm.tokenizer import ByteTokenizer

URL = "memory://bucket/data"


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("data")
    rng = np.random.default_rng(0)
    with ShardWriter(folder, ByteTokenizer(), shard_tokens=200) as writer:
        for length in rng.integers(1, 90, 60):
            writer.append(rng.integers(0, 256, length), end=True)
        writer.close()
    return folder


@pytest.fixture
def store(prepared: Path) -> Iterator[fsspec.AbstractFileSystem]:
    files = fsspec.filesystem("memory")
    files.put(f"{prepared}/", "/bucket/data/", recursive=True)
    yield files
    files.rm("/bucket", recursive=True)


@pytest.fixture
def cache(tmp_path: Path) -> Cache:
    return Cache(tmp_path / "cache", 10**6)


def cached(cache: Cache) -> list[str]:
    return sorted(path.stem for path in cache.folder.glob("*.npy"))


@pytest.mark.parametrize("group", [None, 2])
def test_a_url_gives_the_batches_of_the_folder(store, prepared: Path, cache: Cache, group: int | None) -> None:
    here, there = TokenDataset.open(prepared), TokenDataset.open(URL, cache)
    assert len(here.meta.shards) > 5
    assert here.meta == there.meta
    assert str(there.folder) == URL
    assert not cache.folder.exists(), "no shard before it is read"
    one, other = (Loader(dataset, 4, 16, seed=1, documents=True, group=group) for dataset in (here, there))
    for step in (*range(0, 60, 7), 10**6):
        a, b = one.batch(step), other.batch(step)
        assert torch.equal(a.input_ids, b.input_ids)
        assert torch.equal(a.targets, b.targets)
        assert a.segments is not None
        assert b.segments is not None
        assert torch.equal(a.segments, b.segments)
    assert one.fingerprint() == other.fingerprint()
    # What is in the cache is not fetched again, by another process either.
    wait_for_threads()
    if group is None:
        assert len(cached(cache)) == 2 * len(here.meta.shards)
        later = Loader(TokenDataset.open(URL, cache), 4, 16, seed=1)
        for number in range(len(here.meta.shards)):
            store.rm(f"/bucket/data/tokens-{number:05d}.npy")
        assert torch.equal(later.batch(3).input_ids, Loader(here, 4, 16, seed=1).batch(3).input_ids)


def test_groups_are_fetched_ahead_and_old_ones_make_room(store, prepared: Path, tmp_path: Path) -> None:
    probe = Loader(TokenDataset.open(prepared), 4, 16, seed=1, group=2)
    limit = probe.bytes_at_once()
    cache = Cache(tmp_path / "cache", limit)
    dataset = TokenDataset.open(URL, cache)
    loader = Loader(dataset, 4, 16, seed=1, group=2)
    seen = set()
    for step in range(loader.rows // 4 * 2):
        assert torch.equal(loader.batch(step).input_ids, probe.batch(step).input_ids)
        wait_for_threads()
        now, later = loader.order.shards(step * 4)
        seen |= {*now}
        assert {file.sha256 for file in dataset.shard_files([*now, *later], documents=False)} <= {*cached(cache)}
        assert sum(path.stat().st_size for path in cache.folder.glob("*.npy")) <= limit
    assert len(seen) == len(dataset.meta.shards)


def wait_for_threads() -> None:
    for thread in threading.enumerate():
        if thread.name.startswith("shards of"):
            thread.join(10)


def test_processes_of_one_machine_fetch_each_shard_once(prepared: Path, tmp_path: Path) -> None:
    """Several at once, all of which need everything: one file each in the cache, nothing half-written, no waste."""
    log = tmp_path / "log"
    program = f"""
import sys
from pathlib import Path
from samba_lm.data import remote
from samba_lm.data.cache import Cache
from samba_lm.data.shards import TokenDataset
fetch = remote.RemoteFolder._fetch
def told(self, file, path):
    with open({str(log)!r}, "a") as log:
        log.write(file.name + "\\n")
    fetch(self, file, path)
remote.RemoteFolder._fetch = told
dataset = TokenDataset.open("file://{prepared}", Cache(Path({str(tmp_path / "cache")!r})))
dataset.expect(range(len(dataset.meta.shards)), ())
print(dataset.tokens(0, dataset.num_tokens).sum(), dataset.document_ends(0, dataset.num_tokens).sum())
"""
    running = [subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, text=True) for _ in range(3)]
    sums = {process.communicate(timeout=100)[0] for process in running}
    assert [process.returncode for process in running] == [0, 0, 0]
    assert len(sums) == 1
    fetched = log.read_text().split()
    assert len(fetched) == len({*fetched}) >= len(TokenDataset.open(prepared).meta.shards)
    assert not [path for path in (tmp_path / "cache").iterdir() if path.suffix not in (".npy", ".lock")]


def test_what_a_killed_process_left_is_cleared_away(store, cache: Cache) -> None:
    dataset = TokenDataset.open(URL, cache)
    sha = dataset.meta.shards[0].tokens_sha256
    cache.folder.mkdir()
    left = cache.folder / f"{sha}.npy.tmp-abc"
    left.write_bytes(b"half")
    (cache.folder / f"{sha}.npy").write_bytes(b"cut short by a full disk")
    dataset.tokens(0, 5)
    assert not left.exists()
    assert cached(cache) == [sha]


def harm(store: fsspec.AbstractFileSystem, name: str, change) -> None:
    store.pipe(f"/bucket/data/{name}", change(store.cat(f"/bucket/data/{name}")))


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (None, r"bucket/data/tokens-00002.npy is missing \(shard 3 of \d+\): copy it there again"),
        (lambda data: data[:-2], r"tokens-00002.npy \(shard 3 of \d+\) has \d+ bytes, not the \d+ of meta.json"),
        (lambda data: data[:-2] + b"\1\1", r"tokens-00002.npy \(shard 3 of \d+\) was changed: its sha256 is"),
    ],
)
def test_a_shard_that_is_not_right_is_told(store, cache: Cache, change, words: str, capsys) -> None:
    dataset = TokenDataset.open(URL, cache)
    if change is None:
        store.rm("/bucket/data/tokens-00002.npy")
    else:
        harm(store, "tokens-00002.npy", change)
    first = sum(shard.tokens for shard in dataset.meta.shards[:2])
    dataset.tokens(first - 3, first)
    with pytest.raises(UserError, match=words):
        dataset.tokens(first, first + 3)
    assert len(cached(cache)) == 1
    with pytest.raises(UserError, match=words):
        dataset.verify()
    assert main(["data", "verify", URL]) == 2
    assert "tokens-00002.npy" in capsys.readouterr().err
    if "sha256" not in words:  # that shows only when it is read
        with pytest.raises(UserError, match=words):
            TokenDataset.open(URL, cache)


@pytest.mark.parametrize("name", ["../../elsewhere", "/tmp/elsewhere", "ab", "A" * 64, "0" * 64 + "\n"])
def test_a_description_names_no_file_outside_the_cache(store, cache: Cache, name: str) -> None:
    meta = json.loads(store.cat("/bucket/data/meta.json"))
    meta["shards"][0]["tokens_sha256"] = name
    store.pipe("/bucket/data/meta.json", json.dumps(meta).encode())
    with pytest.raises(UserError, match=r"meta.json is damaged at 'shards.0.tokens_sha256'"):
        TokenDataset.open(URL, cache)


def test_verify_reads_what_lies_there_not_the_cache(store, cache: Cache, capsys) -> None:
    dataset = TokenDataset.open(URL, cache)
    dataset.tokens(0, dataset.num_tokens)
    dataset.verify()
    harm(store, "tokens-00000.npy", lambda data: data[:-2] + b"\1\1")
    dataset.tokens(0, dataset.num_tokens)
    with pytest.raises(UserError, match="was changed"):
        dataset.verify()


def test_commands_take_urls(store, prepared: Path, monkeypatch, tmp_path: Path, capsys) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert main(["data", "verify", URL]) == 0
    assert main(["data", "show", URL, "--json", str(tmp_path / "show.json")]) == 0
    out = capsys.readouterr().out
    assert f"{URL}: whole." in out
    assert f"Document 0 of {URL}" in out
    store.put(f"{prepared}/", "/bucket/both/train/", recursive=True)
    store.put(f"{prepared}/", "/bucket/both/val/", recursive=True)
    train, val = open_splits("memory://bucket/both")
    assert val is not None
    assert (train.folder.name, val.folder.name) == ("train", "val")


@pytest.mark.parametrize(
    ("url", "words"),
    [
        ("memory://bucket/nothing", "memory://bucket/nothing has no meta.json: check the address"),
        ("nowhere://bucket/data", "nowhere://bucket/data cannot be opened .*Protocol not known"),
        ("memory://bucket/both", "holds two data sets: name memory://bucket/both/train or memory://bucket/both/val"),
    ],
)
def test_urls_that_lead_nowhere(store, prepared: Path, url: str, words: str) -> None:
    for name in ("train", "val"):
        store.put(f"{prepared}/", f"/bucket/both/{name}/", recursive=True)
    with pytest.raises(UserError, match=words):
        TokenDataset.open(url)


def test_a_place_that_does_not_answer_is_asked_again(store, cache: Cache, monkeypatch) -> None:
    monkeypatch.setattr(remote, "_WAITS", (0.0, 0.0))
    dataset = TokenDataset.open(URL, cache)
    get, failed = type(store).get_file, []

    def flaky(self, there: str, here: str, **options: object) -> None:
        if len(failed) < 2:
            failed.append(there)
            raise ConnectionResetError("reset by user:secret@peer")
        get(self, there, here, **options)

    monkeypatch.setattr(type(store), "get_file", flaky)
    dataset.tokens(0, 5)
    assert len(failed) == 2
    monkeypatch.setattr(type(store), "get_file", lambda *_: (_ for _ in ()).throw(TimeoutError("user:secret@peer")))
    with pytest.raises(UserError, match=r"Cannot read memory://bucket/data/tokens-00001.npy: .*network") as caught:
        dataset.tokens(dataset.meta.shards[0].tokens, dataset.meta.shards[0].tokens + 1)
    assert "secret" not in str(caught.value)


def test_a_cache_that_is_too_small_or_cannot_be_written(store, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"has no room beside what is being read in the cache .*raise data.cache_gb"):
        TokenDataset.open(URL, Cache(tmp_path / "small", 100)).tokens(0, 5)
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"cannot be written .*set data.cache"):
        TokenDataset.open(URL, Cache(tmp_path / "file")).tokens(0, 5)


def test_more_shards_than_files_may_be_open(tmp_path: Path) -> None:
    resource = pytest.importorskip("resource")
    with ShardWriter(tmp_path, ByteTokenizer(), shard_tokens=1) as writer:
        for number in range(400):
            writer.append(np.array([number % 256] * 8), end=True)
        writer.close()
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (len(os.listdir("/proc/self/fd")) + 600, hard))
    try:
        dataset = TokenDataset.open(tmp_path)
        assert dataset.tokens(0, dataset.num_tokens).size == 3600
        assert dataset.document_ends(0, 3600).size == 400
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
