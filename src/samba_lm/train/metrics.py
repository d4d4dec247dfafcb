"""Model FLOPs utilisation, and metrics.jsonl."""

from __future__ import annotations

import json
import math
import os
import re
from dataclasses import asdict
from pathlib import Path
from typing import IO, Any

import torch

from samba_lm.errors import UserError
from samba_lm.files import write_text
from samba_lm.train.observer import Observer, Plan, StepRecord

PEAK_BF16 = (
    # (pattern of the device's name, dense bf16 FLOP/s with fp32 accumulation, from the makers' data sheets)
    (r"\bGB200\b|\bB200\b", 2250e12),
    (r"\bH200\b|\bGH200\b", 989e12),
    (r"\bH100 PCIe\b", 756e12),
    (r"\bH100 NVL\b", 835e12),
    (r"\bH100\b", 989e12),
    (r"\bA100\b", 312e12),
    (r"\bA10G\b", 70e12),
    (r"\bA10\b", 125e12),
    (r"\bL40S\b", 362e12),
    (r"\bL40\b", 181e12),
    (r"\bL4\b", 121e12),
    (r"\bRTX 5090\b", 209.5e12),
    (r"\bRTX 4090\b", 165.2e12),
    (r"\bRTX 3090\b", 71e12),
)


def peak_flops(device_name: str) -> float | None:
    """Dense bf16 peak of a GPU by its name, FLOP/s; None when it is not in the table."""
    return next((peak for pattern, peak in PEAK_BF16 if re.search(pattern, device_name)), None)


def device_peak(device: torch.device) -> float | None:
    """Dense bf16 peak of ``device``, FLOP/s; None for a CPU or an unknown GPU."""
    return peak_flops(torch.cuda.get_device_name(device)) if device.type == "cuda" else None


def mfu(tokens_per_s: float, forward_flops_per_token: float, peak: float | None) -> float | None:
    """Model FLOPs utilisation, 0 to 1: forward plus twice that for backward; recomputed activations do not count."""
    return None if peak is None else 3 * forward_flops_per_token * tokens_per_s / peak


class JsonlMetrics(Observer):
    """One JSON object a line and a logged step: the fields of StepRecord that are known and finite.

    Logged are the first step, the last, every ``every``-th, and those with a validation or a refused update.

    A run that continues first drops the lines after the step it continues from, and a last line cut short, so that
    the file holds each step once. Lines reach the disk before the checkpoint that follows them.
    """

    def __init__(self, path: Path, every: int) -> None:
        self.path = path
        self.every = every
        self.file: IO[str] | None = None
        self.last = 0

    def started(self, plan: Plan) -> None:
        self.last = plan.steps
        self._open(plan.first_step)

    def step(self, record: StepRecord) -> None:
        due = record.step % self.every == 0 or record.step in (1, self.last)
        if self.file is None or not (due or record.refused or record.val_loss is not None):
            return
        fields = {key: value for key, value in asdict(record).items() if _known(value)}
        self.file.write(json.dumps(fields) + "\n")
        self.file.flush()

    def returned(self, step: int) -> None:
        if self.file is not None:
            self.file.close()
        self._open(step)

    def saving(self) -> None:
        if self.file is not None:
            os.fsync(self.file.fileno())

    def stopped(self) -> None:
        if self.file is not None:
            self.file.close()

    def _open(self, step: int) -> None:
        """Go on after ``step``."""
        kept = [record for record in read_metrics(self.path) if record["step"] <= step]
        write_text(self.path, "".join(json.dumps(record) + "\n" for record in kept))
        self.file = self.path.open("a", encoding="utf-8")


def _known(value: Any) -> bool:
    """Whether a field says something: JSON has no numbers that are not finite."""
    if value is None or value is False or value == {}:
        return False
    return not isinstance(value, float) or math.isfinite(value)


def read_metrics(path: Path) -> list[dict[str, float]]:
    """The records of a metrics.jsonl, in order; a missing file is empty, a last line cut short is left out.

    Raises UserError for a bad line elsewhere.
    """
    if not path.exists():
        return []
    if path.is_dir():
        raise UserError(f"{path} is a folder: move it away.")
    lines = path.read_text(encoding="utf-8", errors="replace").splitlines()
    records = []
    for number, line in enumerate(lines, start=1):
        try:
            record = json.loads(line)
            records.append({**record, "step": int(record["step"])})
        except (ValueError, KeyError, TypeError, OverflowError, RecursionError):
            if number < len(lines):
                raise UserError(f"{path}, line {number} is not a metrics record: move the file away.") from None
    return records
