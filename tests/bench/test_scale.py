"""`bench scale` on CPUs: real processes, tiny models."""

from __future__ import annotations

import dataclasses
import json
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from processes import below
from ranks import on_ranks

from samba_lm.bench.scale import BOUNDS, Work, figures, layouts, measure
from samba_lm.cli.main import main

TINY = Work(
    model="samba-micro", rows=2, micro_batch=1, length=32, warm_up=1, steps=1,
    long_model="samba-micro", long_length=128, long_steps=1,
    loss_model="samba-micro", loss_rows=4, loss_length=32, loss_steps=2,
)  # fmt: skip


def part(work: dict[str, Any], most: int) -> Any:
    """One rank's; its record and whether it writes it."""
    return measure(Work(**work), most, "cpu")


def test_one_and_four_processes() -> None:
    alone, writes = measure(TINY, 4, "cpu")
    assert writes
    told = on_ranks(4, part, dataclasses.asdict(TINY), 4)
    assert [writes for _, writes in told] == [True, False, False, False]
    several = told[0][0]
    assert set(several["losses"]["float32"]) == set(layouts(4))
    assert len(layouts(4)) == 4
    assert (alone["context"]["length"], several["context"]["length"]) == (32, 128)
    found = figures(TINY, {1: alone, 4: several})
    assert not [figure for figure in found if figure.failed]
    differences = [figure for figure in found if figure.check]
    assert len(differences) == len(layouts(4)) * len(BOUNDS)
    assert any(figure.value for figure in differences), "other layouts sum in another order"
    (share,) = [figure for figure in found if figure.bar == 0.92]
    each = several["speed"]["tokens_per_s_per_gpu"]
    assert share.value == pytest.approx(each / alone["speed"]["tokens_per_s_per_gpu"])
    assert several["speed"]["tokens_per_s"] == pytest.approx(4 * each)

    several["speed"] |= {"step_ms": 900.0, "min": 500.0, "max": 1500.0}
    several["others_GiB"] = [0.6, 21.4, 0.6, 0.6]
    notes = [figure.note for figure in figures(TINY, {1: alone, 4: several}) if figure.name == "samba-micro, 4 GPUs"]
    assert notes == ["other programs hold 21 GiB of a GPU, steps of 500 to 1,500 ms"]

    several["losses"]["float32"]["shard 4"]["losses"][1] *= 1.01
    several["speed"] = {"failed": "out of memory"}
    several["context"] = {"length": 128, "failed": "out of memory"}
    worse = figures(TINY, {1: alone, 4: several, 2: {"failed": "exit code 1"}})
    notes = {figure.name: figure.note for figure in worse if figure.failed}
    assert "out of memory" in notes.values()
    assert "exit code 1" in notes.values()
    assert notes["samba-micro, a row of 128 tokens among 4 GPUs"] == "out of memory"
    assert notes["samba-micro, a row of 64 tokens among 2 GPUs"] == "exit code 1"
    assert sum("float32, shard 4" in name for name in notes) == 1


@pytest.mark.slow
def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "scale.json"
    options = (
        "--gpus 1,2 --rows 2 --micro-batch 1 --length 32 --steps 2 --long-length 128 --loss-rows 2 --loss-length 32"
    )
    models = "--model samba-micro --long-model samba-micro --loss-model samba-micro --device cpu"
    code = main(["bench", "scale", *options.split(), *models.split(), "--json", str(file)])
    out = capsys.readouterr().out
    assert code == 0, out
    told = json.loads(file.read_text())
    assert set(told["parts"]) == {"1", "2"}
    assert told["work"]["long_length"] == 128
    assert "share of the speed" in " ".join(out.split())


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="reads who started whom in /proc")
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
def test_a_signal_ends_what_was_started(number: int) -> None:
    """The command's own processes too, which are of a session of their own."""
    words = ["bench", "scale", "--gpus", "1", "--device", "cpu", *["--model", "samba-micro", "--steps", "900"]]
    process = subprocess.Popen([sys.executable, "-m", "samba_lm", *words], stdout=subprocess.DEVNULL)

    end = time.monotonic() + 60
    while len(children := below(process.pid)) < 2 and time.monotonic() < end:  # torchrun and a process of its own
        time.sleep(0.2)
    assert len(children) >= 2
    process.send_signal(number)
    assert process.wait(60) == 128 + number
    assert not [pid for pid in children if Path(f"/proc/{pid}").exists()]


def test_without_a_gpu_the_cpu_is_only_taken_when_asked_for(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    assert main(["bench", "scale", "--gpus", "1"]) == 2
    assert "There is no GPU here. --device cpu" in capsys.readouterr().err


@pytest.mark.slow
def test_what_does_not_end_is_ended(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        main(["bench", "scale", "--gpus", "1", "--device", "cpu", "--timeout", "2"])
    assert stop.value.code == 1
    assert "not done after 2 s" in " ".join(capsys.readouterr().out.split())


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--gpus", "2,4"], ["--gpus 2,4", "1 among them"]),
        (["--gpus", "1,x"], ["--gpus"]),
        (["--rows", "6"], ["--micro-batch 4", "--rows 6"]),
        (["--gpus", "1,3"], ["--gpus 3 does not divide"]),
        (["--model", "samba-1.3B"], ["Did you mean 'samba-1.3b'"]),
    ],
)
def test_mistakes_are_told(options: list[str], words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", "scale", *options]) == 2
    err = capsys.readouterr().err
    assert err.count("\n") == 1
    for word in words:
        assert word in err, err
