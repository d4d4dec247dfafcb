from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from samba_lm.errors import UserError
from samba_lm.train.metrics import JsonlMetrics, mfu, peak_flops, read_metrics
from samba_lm.train.observer import Plan, StepRecord
from samba_lm.train.trackers import TensorBoardMetrics


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


def test_tensorboard_missing_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    with pytest.raises(UserError, match=r"pip install 'samba-lm\[tensorboard\]'"):
        TensorBoardMetrics(tmp_path, every=1)
