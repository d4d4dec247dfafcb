from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch

from samba_lm import checkpoint, zoo
from samba_lm.data.loader import Loader
from samba_lm.data.shards import TokenDataset
from samba_lm.memory import resident_memory
from samba_lm.model import SambaLM
from samba_lm.train.loop import fit
from samba_lm.train.measure import Measure, gradient_groups
from samba_lm.train.observer import Observer, StepRecord
from samba_lm.train.parallel import connect
from samba_lm.train.recipe import TrainSection

CPU = connect("cpu")


def model(tied: bool = False) -> SambaLM:
    return checkpoint.create(zoo.get("samba-micro").with_overrides(vocab_size=320, tie_embeddings=tied), seed=0)


@pytest.mark.parametrize("tied", [True, False])
def test_every_parameter_is_in_one_group(tied: bool) -> None:
    one = model(tied)
    groups = gradient_groups(one)
    assert set(groups) == {"embedding", "mamba", "attention", "mlp", "norms", *(() if tied else ("head",))}
    grouped = [p for group in groups.values() for p in group]
    assert len(grouped) == len({*grouped}) == len([*one.parameters()])
    one.embedding.requires_grad_(False)
    assert "embedding" not in gradient_groups(one)


class Records(Observer):
    def __init__(self) -> None:
        self.records: list[StepRecord] = []

    def step(self, record: StepRecord) -> None:
        self.records.append(record)


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_the_groups_norms_make_the_whole_norm_before_clipping(data: Path, optimizer: str) -> None:
    loader = Loader(TokenDataset.open(data / "train"), 4, 32, 0)
    section = TrainSection(
        steps=5, batch_size=4, length=32, device="cpu", clip=0.1, log_every=2, optimizer=optimizer, lr=1e-3
    )
    seen = Records()
    fit(model(), loader, section, observer=seen)
    assert [bool(record.grad_norms) for record in seen.records] == [True, True, False, True, True]
    for record in seen.records:
        assert record.grad_norm > 0.1
        assert not record.grad_norms or math.hypot(*record.grad_norms.values()) == pytest.approx(record.grad_norm)
        assert record.tokens_per_s_per_gpu == record.tokens_per_s
        assert record.length == 32
        assert record.data_wait_s is not None
        assert 0 <= record.data_wait_s < 128 / record.tokens_per_s
        assert record.memory_peak is not None
        assert record.memory_peak > resident_memory() / 2
        assert (record.memory_reserved, record.refused, record.skipped, record.rollbacks) == (None, False, None, None)


def test_a_groups_norm_is_its_own() -> None:
    one = model()
    for p in one.parameters():
        p.grad = torch.zeros_like(p)
    assert one.unembedding is not None
    one.unembedding.grad = torch.full_like(one.unembedding, 2.0)
    measure = Measure(one, CPU, length=32, every=10, last=100)
    found = measure.grad_norms(10, total=7.0)
    assert found == {**dict.fromkeys(found, 0.0), "head": pytest.approx(7.0)}
    assert measure.grad_norms(11, total=7.0) == {}
    assert measure.grad_norms(10, total=math.nan) == {}
