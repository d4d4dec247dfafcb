from __future__ import annotations

import json
import math
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from samba_lm.errors import UserError
from samba_lm.train.metrics import JsonlMetrics, mfu, peak_flops, read_metrics
from samba_lm.train.observer import Plan, StepRecord
from samba_lm.train.trackers import TensorBoardMetrics, WandbMetrics


def plan(first_step: int = 0, steps: int = 10) -> Plan:
    return Plan("samba-micro", 1000, "cpu", first_step, steps, 64)


def record(step: int, val_loss: float | None = None, mfu: float | None = None) -> StepRecord:
    return StepRecord(step, 64 * step, 5.0 / step, 1e-3, 0.5, 1234.5, mfu, val_loss)


@pytest.mark.parametrize(
    ("name", "peak"),
    [
        ("NVIDIA A100-SXM4-80GB", 312e12),
        ("NVIDIA H100 80GB HBM3", 989e12),
        ("NVIDIA H100 PCIe", 756e12),
        ("NVIDIA H200", 989e12),
        ("NVIDIA L4", 121e12),
        ("NVIDIA L40S", 362e12),
        ("NVIDIA GeForce RTX 4090", 165.2e12),
        ("Tesla K80", None),
    ],
)
def test_peaks_by_name(name: str, peak: float | None) -> None:
    assert peak_flops(name) == peak


def test_mfu_counts_forward_and_twice_that_for_backward() -> None:
    assert mfu(1e5, 1e9, 989e12) == pytest.approx(3 * 1e5 * 1e9 / 989e12)
    assert mfu(1e5, 1e9, None) is None


def test_jsonl_holds_each_logged_step(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    metrics = JsonlMetrics(path, every=4)
    metrics.started(plan())
    for step in range(1, 11):
        metrics.step(record(step, val_loss=2.5 if step == 6 else None, mfu=0.4 if step == 8 else None))
    metrics.saving()
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    assert [line["step"] for line in lines] == [1, 4, 6, 8, 10], "the first, every fourth, validations, the last"
    assert [line.get("val_loss") for line in lines] == [None, None, 2.5, None, None]
    assert lines[3]["mfu"] == 0.4
    assert set(lines[0]) == {"step", "tokens", "loss", "lr", "grad_norm", "tokens_per_s"}
    metrics.stopped()


def test_continuing_drops_later_lines_and_a_torn_one(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1, "loss": 5.0}\n{"step": 2, "loss": 4.0}\n{"step": 3, "loss": 3.0}\n{"step": 4, "lo')
    assert [r["step"] for r in read_metrics(path)] == [1, 2, 3]
    metrics = JsonlMetrics(path, every=1)
    metrics.started(plan(first_step=2))
    metrics.step(record(3))
    metrics.stopped()
    assert [(r["step"], r["loss"]) for r in read_metrics(path)] == [(1, 5.0), (2, 4.0), (3, pytest.approx(5 / 3))]


@pytest.mark.parametrize("bad", ["{", "[]", '{"loss": 1}', "7"])
def test_a_foreign_file_is_told(tmp_path: Path, bad: str) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text(f'{{"step": 1}}\n{bad}\n{{"step": 2}}\n')
    with pytest.raises(UserError, match="line 2"):
        read_metrics(path)


def test_no_file_is_an_empty_run(tmp_path: Path) -> None:
    assert read_metrics(tmp_path / "none.jsonl") == []


def test_going_back_drops_what_comes_anew(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    metrics = JsonlMetrics(path, every=1)
    metrics.started(plan())
    for step in (1, 2, 3):
        metrics.step(record(step))
    metrics.returned(1)
    metrics.step(replace(record(2), loss=1.25))
    metrics.stopped()
    assert [(r["step"], r["loss"]) for r in read_metrics(path)] == [(1, 5.0), (2, 1.25)]


def test_what_is_unknown_or_not_finite_is_left_out(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    metrics = JsonlMetrics(path, every=10)
    metrics.started(plan(steps=100))
    refused = replace(record(7), loss=math.nan, refused=True, skipped=0, grad_norms={"mlp": 0.5}, memory_peak=7)
    metrics.step(refused)
    metrics.stopped()
    line = json.loads(path.read_text(), parse_constant=pytest.fail)
    known = {"step", "tokens", "lr", "grad_norm", "tokens_per_s", "refused", "skipped", "grad_norms", "memory_peak"}
    assert set(line) == known, "a refused step is always logged"
    assert line["grad_norms"] == {"mlp": 0.5}


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_tensorboard_files_hold_the_scalars(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    metrics = TensorBoardMetrics(tmp_path / "tb", every=2)
    metrics.started(plan())
    for step in range(1, 5):
        metrics.step(record(step, val_loss=9.0 if step == 3 else None, mfu=0.25))
    metrics.stopped()
    again = TensorBoardMetrics(tmp_path / "tb", every=1)
    again.started(plan(first_step=3))
    again.step(record(4, mfu=0.5))
    again.stopped()
    events = EventAccumulator(str(tmp_path / "tb"))
    events.Reload()
    assert {"loss/train", "loss/val", "lr", "grad_norm", "tokens_per_s", "mfu"} <= set(events.Tags()["scalars"])
    assert [(e.step, e.value) for e in events.Scalars("mfu")] == [(2, 0.25), (4, 0.5)], "step 4 only once"
    assert [(e.step, e.value) for e in events.Scalars("loss/val")] == [(3, 9.0)]


@pytest.fixture
def offline(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    monkeypatch.setenv("WANDB_ERROR_REPORTING", "false")


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # its own
@pytest.mark.usefixtures("offline")
def test_wandb_gets_the_figures_and_a_continued_run_is_the_same_one(tmp_path: Path) -> None:
    """The real package, which writes what it would send to a file."""
    ids: list[str] = []
    told: list[str] = []
    for first in (0, 3):
        metrics = WandbMetrics(tmp_path / "wandb", 2, "samba", {"train": {"lr": 0.5}}, told.append)
        metrics.started(plan(first_step=first))
        assert metrics.run is not None
        ids.append(metrics.run.id)
        for step in range(first + 1, first + 4):
            metrics.step(record(step, val_loss=9.0 if step == 3 else None, mfu=0.25))
        metrics.stopped()
    assert ids[0] == ids[1] == (tmp_path / "wandb" / "run-id").read_text().strip()
    assert [ids[0] in text and "wandb sync" in text for text in told] == [True, True]
    written = sorted((tmp_path / "wandb").glob("offline-run-*/run-*.wandb"))
    assert len(written) == 2
    assert all(ids[0] in path.name for path in written)
    first_file = written[0].read_bytes()
    for word in (b"loss/val", b"loss/train", b"tokens_per_s", b"mfu"):
        assert word in first_file


def test_wandb_missing_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(UserError, match=r"train.wandb = 'p' needs .*pip install 'samba-lm\[wandb\]'"):
        WandbMetrics(tmp_path, 1, "p", {}, print)


def test_tensorboard_missing_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    with pytest.raises(UserError, match=r"pip install 'samba-lm\[tensorboard\]'"):
        TensorBoardMetrics(tmp_path, every=1)
