from __future__ import annotations

import math
import re
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch

from samba_lm.data.loader import Loader
from samba_lm.data.mixture import BLOCK, Mixture, Part, source_seed
from samba_lm.data.shards import ShardWriter, TokenDataset
from samba_lm.errors import UserError
from samba_lm.tokenizer import ByteTokenizer, train_bpe

LENGTH = 8
ROWS = {"books": 700, "code": 50, "web": 9000}


def write(folder: Path, rows: int, token: int, tokenizer: object = None) -> TokenDataset:
    """Rows that tell their source by the second token and their number by the others."""
    folder.mkdir()
    with ShardWriter(folder, tokenizer or ByteTokenizer(), shard_tokens=4000) as writer:
        tokens = np.full((rows, LENGTH), token)
        tokens[:, 2], tokens[:, 3] = np.arange(rows) // 256, np.arange(rows) % 256
        tokens[:, -1] = ByteTokenizer().eos_id
        for row in tokens:
            writer.append(row[:-1], end=True)
        writer.close()
    return TokenDataset.open(folder)


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> dict[str, TokenDataset]:
    folder = tmp_path_factory.mktemp("sources")
    return {name: write(folder / name, rows + 1, ord(name[0])) for name, rows in ROWS.items()}


def mixture(
    sources: dict[str, TokenDataset], weights: dict[str, float], seed: int = 0, documents: bool = False, **epochs: float
) -> Mixture:
    return Mixture(
        {
            name: Part(Loader(sources[name], 32, LENGTH, source_seed(seed, name), documents), weight, epochs.get(name))
            for name, weight in weights.items()
        },
        seed,
    )


def names(batch: torch.Tensor) -> list[str]:
    return [{ord(name[0]): name for name in ROWS}[token] for token in batch[:, 1].tolist()]


WEIGHTS = {"books": 0.6, "code": 0.1, "web": 0.3}


def test_every_batch_is_near_the_weights(sources: dict[str, TokenDataset]) -> None:
    mixed = mixture(sources, WEIGHTS)
    total = Counter()
    for step in range(200):
        here = Counter(names(mixed.batch(step).input_ids))
        total += here
        for name, weight in WEIGHTS.items():
            assert abs(here[name] - 32 * weight) <= 3
            assert abs(total[name] - 32 * (step + 1) * weight) <= 2
    assert mixed.rows_read(200) == dict(total)
    assert mixed.tokens_read(200) == {name: rows * LENGTH for name, rows in total.items()}
    assert mixed.rows is None


def test_each_source_is_read_once_an_epoch_in_its_own_order(sources: dict[str, TokenDataset]) -> None:
    mixed = mixture(sources, WEIGHTS)
    read: dict[str, list[tuple[int, ...]]] = {name: [] for name in ROWS}
    for step in range(60):
        batch = mixed.batch(step)
        for name, row in zip(names(batch.input_ids), batch.input_ids.tolist(), strict=True):
            read[name].append(tuple(row))
    for name, count in ROWS.items():
        alone = Loader(sources[name], 1, LENGTH, source_seed(0, name))
        assert alone.rows == count
        rows = [tuple(alone.batch(i).input_ids[0].tolist()) for i in range(len(read[name]))]
        assert read[name] == rows, "in its own order, whatever is beside it"
        assert len({*read[name][:count]}) == min(count, len(read[name]))
    assert len(read["code"]) > 3 * ROWS["code"]


@pytest.mark.parametrize("documents", [False, True])
def test_a_batch_is_a_function_of_seed_and_step_on_any_number_of_ranks(
    sources: dict[str, TokenDataset], documents: bool
) -> None:
    mixed = mixture(sources, WEIGHTS, documents=documents, code=2)
    other = mixture(sources, dict(reversed(WEIGHTS.items())), documents=documents, code=2)
    for step in (31, 2000, 0, 2047, 2048, 10**9):
        whole = mixed.batch(step)
        assert torch.equal(other.batch(step).input_ids, whole.input_ids), "whatever their order in the recipe"
        for world in (2, 4, 32):
            parts = [mixed.batch(step, rank, world) for rank in range(world)]
            for field in ("input_ids", "targets", "segments"):
                if documents or field != "segments":
                    assert torch.equal(torch.cat([getattr(part, field) for part in parts]), getattr(whole, field))
    assert not torch.equal(mixture(sources, WEIGHTS, seed=1).batch(0).input_ids, mixed.batch(0).input_ids)
    with pytest.raises(UserError, match="batch_size 32 does not divide among 3"):
        mixed.batch(0, 0, 3)


def test_documents_and_targets_come_from_the_row_itself(sources: dict[str, TokenDataset]) -> None:
    batch = mixture(sources, WEIGHTS, documents=True).batch(3)
    assert batch.segments is not None
    assert torch.equal(batch.targets[:, :-1][batch.targets[:, :-1] >= 0], batch.input_ids[:, 1:].flatten())
    assert (batch.targets[:, -1] < 0).all(), "each row here is one document"
    assert (batch.segments == 0).all()


def test_a_source_that_ends(sources: dict[str, TokenDataset]) -> None:
    """Its last row is read, none twice, and the others go on in proportion."""
    mixed = mixture(sources, WEIGHTS, code=2, books=0.5)
    plan = mixed.assigned(np.arange(20 * BLOCK))
    counts = np.bincount(plan[0], minlength=3).tolist()
    assert counts[:2] == [350, 100]
    for source, rows in zip(range(3), counts, strict=True):
        assert np.array_equal(plan[1][plan[0] == source], np.arange(rows))
    last = {name: int(np.flatnonzero(plan[0] == i)[-1]) for i, name in enumerate(mixed.names[:2])}
    assert abs(last["books"] - 350 / 0.6) < 5, "at its own pace until then"
    between = np.bincount(plan[0][last["books"] + 1 : last["code"] + 1], minlength=3)
    assert between[0] == 0
    assert abs(between[1] / between.sum() - 0.25) < 0.01
    for step in (0, 18, 19, 31, 40, 3000):
        assert list(mixed.rows_read(step).values()) == np.bincount(plan[0][: step * 32], minlength=3).tolist()


def test_all_sources_end(sources: dict[str, TokenDataset]) -> None:
    """For a run that passed over batches all go on, in the first proportions and each from where it is."""
    mixed = mixture(sources, {"books": 1, "code": 3}, books=1, code=1.5)
    assert mixed.rows == 775
    assert np.bincount(mixed.assigned(np.arange(775))[0]).tolist() == [700, 75]
    assert mixed.rows_read(24) == mixed.rows_read(24) | {"code": 75}
    mixed.batch(24)  # 768 to 800
    plan = mixed.assigned(np.arange(775 + 400))
    assert np.bincount(plan[0][775:]).tolist() in ([99, 301], [100, 300], [101, 299])
    for source in (0, 1):
        ordinals = plan[1][plan[0] == source]
        assert np.array_equal(ordinals, np.arange(ordinals.size))
    for step in (24, 25, 36):
        assert list(mixed.rows_read(step).values()) == np.bincount(plan[0][: step * 32]).tolist()


def test_what_does_not_fit_is_told(sources: dict[str, TokenDataset], tmp_path: Path) -> None:
    for weight in (0, -1, math.nan, math.inf):
        with pytest.raises(UserError, match=re.escape(f"'code' has the weight {weight:g}: it must be more than 0")):
            mixture(sources, {"books": 1, "code": weight})
    with pytest.raises(UserError, match="'code' has the weight 1e-06, less than one row in 65,536"):
        mixture(sources, {"books": 1, "code": 1e-6})
    with pytest.raises(UserError, match="'code' may be read 0 times"):
        mixture(sources, WEIGHTS, code=0)
    with pytest.raises(UserError, match="no sources"):
        Mixture({}, 0)
    other = write(tmp_path / "other", 30, 65, train_bpe(["a text of words"] * 9, 260))
    with pytest.raises(UserError, match=r"'books' \(.*\) and 'other' \(.*other\) were made with different tokenizers"):
        mixture(sources | {"other": other}, {"books": 1, "other": 1})


def test_fingerprint(sources: dict[str, TokenDataset]) -> None:
    known = mixture(sources, WEIGHTS).fingerprint()
    assert mixture(sources, {name: 2 * weight for name, weight in WEIGHTS.items()}).fingerprint() == known
    assert mixture(sources, WEIGHTS | {"web": 0.2}).fingerprint() != known
    assert mixture(sources, WEIGHTS, code=2).fingerprint() != known
    assert mixture(sources, {"books": 0.6, "code": 0.4}).fingerprint() != known
