from __future__ import annotations

import io
import math
from dataclasses import replace
from pathlib import Path

import pytest
from rich.console import Console

from samba_lm.train.observer import Plan, StepRecord
from samba_lm.train.progress import (
    LiveProgress,
    PlainProgress,
    count,
    duration,
    progress_observer,
    sparkline,
)

PLAN = Plan("samba-tiny", 946_816, "cpu", 0, 100, 1000)


def record(step: int, val_loss: float | None = None) -> StepRecord:
    return StepRecord(step, 1000 * step, 6.0 - step / 50, 1e-3, 0.5, 12_345.0, 0.412, val_loss)


def console(width: int, terminal: bool) -> tuple[Console, io.StringIO]:
    file = io.StringIO()
    return Console(file=file, width=width, force_terminal=terminal, color_system=None, _environ={}), file


def test_plain_lines_for_pipes() -> None:
    screen, file = console(40, terminal=False)
    seen = progress_observer(screen, 10)
    assert isinstance(seen, PlainProgress)
    seen.started(PLAN)
    for step in range(1, 25):
        seen.step(record(step, val_loss=5.25 if step == 13 else None))
    seen.saved(24, Path("runs/x/step-00000024"))
    seen.message("a [bracketed] word")
    seen.stopped()
    lines = file.getvalue().splitlines()
    assert lines[0] == "Training samba-tiny (947K parameters) on cpu"
    assert [line.split()[1] for line in lines[1:4]] == ["10/100", "13/100", "20/100"]
    assert lines[1] == "step 10/100  loss 5.8000  lr 1.00e-03  norm 0.50  12.3K tok/s  MFU 41.2%  ETA 7s"
    assert "val 5.2500" in lines[2]
    assert lines[4:] == ["saved runs/x/step-00000024", "a [bracketed] word"]


@pytest.mark.parametrize("width", [40, 100])
def test_live_view_fits_the_terminal(width: int) -> None:
    screen, file = console(width, terminal=True)
    seen = progress_observer(screen, 10)
    assert isinstance(seen, LiveProgress)
    seen.started(PLAN)
    for step in range(1, 51):
        seen.step(record(step, val_loss=5.25 if step == 20 else None))
    seen.saved(50, Path("runs/a-rather-long-name-for-a-run/step-00000050"))
    still, drawn = console(width, terminal=False)
    still.print(seen.render())
    seen.stopped()
    text = drawn.getvalue()
    assert max(map(len, text.splitlines())) <= width
    for word in ("samba-tiny", "step 50/100", "loss 5.0000", "val 5.2500", "12.3K tok/s", "MFU 41.2%", "ETA 4s"):
        assert word in text, "no figure is torn apart"
    assert "step-00000050" in text.replace("\n", "")
    assert "\n━" in text
    assert "\nstep" in text
    assert "\n█" in text
    assert "samba-tiny" in file.getvalue()


MANY = replace(PLAN, device="cuda:0", length=2048, world=8, mesh={"replicate": 2, "shard": 4, "context": 1})


def busy(step: int, loss: float) -> StepRecord:
    """One of eight processes, which waits 16 of a step's 81 ms."""
    return StepRecord(
        step=step,
        tokens=1000 * step,
        loss=loss,
        lr=1e-3,
        grad_norm=0.5,
        tokens_per_s=12_345.0,
        mfu=0.412,
        val_loss=5.0,
        val_losses={"books": 5.0, "code": 4.0},
        data_wait_s=0.016,
        length=512,
        memory_peak=34_200_000_000,
        skipped=2,
        rollbacks=1,
    )


@pytest.mark.parametrize("width", [60, 100])
def test_live_view_of_several_processes(width: int) -> None:
    screen, _ = console(width, terminal=True)
    seen = LiveProgress(screen)
    seen.started(MANY)
    for step, loss in ((1, 6.0), (2, 5.0), (3, math.nan), (4, 3.0)):
        seen.step(busy(step, loss))
    seen.returned(2)
    seen.step(busy(3, 5.5))
    still, drawn = console(width, terminal=False)
    still.print(seen.render())
    seen.stopped()
    text = drawn.getvalue()
    assert max(map(len, text.splitlines())) <= width
    assert "on cuda:0, 8 processes (2 replicas x 4 shards)" in " ".join(text.split())
    for word in (
        *("step 3/100", "loss 5.5000", "rows of 512", "val books 5.0000", "val code 4.0000"),
        *("12.3K tok/s", "1.54K tok/s each"),
        *("mem 34.2GB", "data wait 20%", "skipped 2", "went back 1x", "ETA 8s"),
    ):
        assert word in text, "no figure is torn apart"
    assert "█▁▅" in text, "what was gone back from is no longer drawn"


def test_live_view_before_the_first_step() -> None:
    screen, _ = console(40, terminal=True)
    seen = LiveProgress(screen)
    seen.started(PLAN)
    still, drawn = console(40, terminal=False)
    still.print(seen.render())
    seen.stopped()
    assert "samba-tiny" in drawn.getvalue()


def test_sparkline() -> None:
    assert sparkline([8.0, 4.0, 1.0], 10) == "█▄▁"
    assert len(sparkline([float(x) for x in range(1000)], 30)) == 30
    assert sparkline([1.0, 1.0], 5) == "▁▁"
    assert sparkline([], 5) == ""


@pytest.mark.parametrize(
    ("number", "text"), [(950, "950"), (1234, "1.23K"), (12_345, "12.3K"), (421_793_280, "422M"), (1.2e9, "1.20B")]
)
def test_count(number: float, text: str) -> None:
    assert count(number) == text


@pytest.mark.parametrize(
    ("number", "text"),
    [(0, "0"), (999, "999"), (999_600, "1.00M"), (1.33e9, "1.33G"), (5e12, "5.00T"), (5e15, "5000T")],
)
def test_count_in_other_units(number: float, text: str) -> None:
    assert count(number, "KMGT") == text


@pytest.mark.parametrize(
    ("seconds", "text"), [(0.4, "0s"), (59, "59s"), (187, "3m07s"), (7500, "2h05m"), (273_600, "3d04h")]
)
def test_duration(seconds: float, text: str) -> None:
    assert duration(seconds) == text
