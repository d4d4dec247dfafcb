"""Benchmarks measure what they say, refuse to give a speed without parity, and write their figures."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path

import pytest
import torch

from samba_lm.bench import language_model, memory, scan
from samba_lm.bench.figure import Figure
from samba_lm.bench.parity import ParityError, require_close
from samba_lm.bench.timing import best, matvec_bandwidth
from samba_lm.cli import bench as command
from samba_lm.memory import peak_memory
from samba_lm.model import SambaLM


def test_scan_figures() -> None:
    figures = {f.name: f for f in scan.run_scan(1, 40, 16, 4)}
    assert len(figures) == 5
    assert all(f.value > 0 for f in figures.values())


def test_no_speed_without_parity(monkeypatch: pytest.MonkeyPatch) -> None:
    right = scan._run

    def wrong(given: scan.Inputs, backend: str) -> tuple[torch.Tensor, torch.Tensor]:
        y, state = right(given, backend)  # type: ignore[arg-type]
        return (y * 1.001 if backend == "cpu" else y), state

    monkeypatch.setattr(scan, "_run", wrong)
    with pytest.raises(ParityError, match="y: off by 1"):
        scan.run_scan(1, 20, 8, 4)


def test_nan_is_no_parity() -> None:
    with pytest.raises(ParityError):
        require_close(torch.tensor([float("nan")]), torch.ones(1), 1.0, "nan")


def test_language_model_against_transformers() -> None:
    pytest.importorskip("transformers")
    figures = {f.name: f for f in language_model.run_language_model(prompt=70, decode=4, name="mamba-micro")}
    assert figures["parity: worst relative difference from transformers"].met
    assert all(f.value > 0 for f in figures.values())


def test_memory_is_measured_in_processes_of_their_own() -> None:
    ballast = torch.ones(200_000_000 // 4)  # what this process holds must not count there
    figures = memory.run_memory("samba-micro", 1_000, 9_000)
    parity, low, high, growth, speed = (f.value for f in figures)
    assert figures[0].met
    assert parity >= 0  # to the bit where chunks end at the scan's and attention's own
    assert len(list(memory.random_chunks(320, memory.PARITY_TOKENS))) > 1  # so two readings are compared
    assert peak_memory() / 1e6 > 200
    assert 50 < low < peak_memory() / 1e6
    assert growth == pytest.approx(high - low)
    assert growth < 50
    assert speed > 0
    assert ballast[0] == 1


def test_no_memory_figure_without_parity(monkeypatch: pytest.MonkeyPatch) -> None:
    right = memory.last_logits

    def forgetful(model: SambaLM, chunks: Iterable[torch.Tensor]) -> torch.Tensor:
        return right(model, list(chunks)[-1:])  # begins anew with each chunk

    monkeypatch.setattr(memory, "last_logits", forgetful)
    with pytest.raises(ParityError, match="read in chunks: off by"):
        memory.run_memory("samba-micro", 100, 200)


def test_timing_parts() -> None:
    calls = []
    assert best(lambda: calls.append(1), 3) >= 0
    assert len(calls) == 4
    assert matvec_bandwidth(64, 64, 1 << 16, repeats=1) > 0
    assert Figure("a", 5.0, "ns", 4.0).met is False
    assert Figure("a", 5.0, "x", 4.0, low_is_good=False).met is True
    assert Figure("a", 5.0, "x").met is None


def test_the_command_writes_its_figures(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(command, "_runners", lambda: {"scan": lambda: scan.run_scan(1, 20, 8, 4)})
    command.main(["scan", "--json", str(tmp_path / "b.json")])
    record = json.loads((tmp_path / "b.json").read_text())
    assert {"name", "value", "unit", "bar", "met", "low_is_good"} == record["figures"]["scan"][0].keys()
    assert record["torch"] == torch.__version__
