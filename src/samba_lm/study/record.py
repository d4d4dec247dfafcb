"""What is known of one training: a JSON file, whose existence is the study's only bookkeeping."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError

from samba_lm.errors import UserError
from samba_lm.files import read_json, write_text
from samba_lm.validation import explain

FORMAT = "samba-lm study run"
CURVE_POINTS = 200
TAIL = 0.05
"""Share of the steps, at the end, over which the training loss is averaged."""

Status = Literal["trained", "done", "diverged", "failed"]
"""trained: not all evaluations are there. done: they are. diverged, failed: see the reason."""


class Row(BaseModel):
    """What tables and figures read of one length's result; the rest may be anything."""

    model_config = ConfigDict(strict=True)

    length: int
    positions: Annotated[tuple[int, int], Field(strict=False)]
    windows: int
    tokens: int
    loss: float | None
    means: list[float]
    group: Annotated[int, Field(ge=1)] = 1
    """Windows that each of the means is of; the last one's are those that are left."""
    note: str


def _row(row: dict[str, Any]) -> dict[str, Any]:
    Row.model_validate(row)
    return row


Result = Annotated[dict[str, Any], AfterValidator(_row)]


class Measured(BaseModel):
    """One evaluation's results."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: str
    fingerprint: str
    """sha256 of its settings and data."""
    seconds: float
    results: list[Result]
    """One for each length, as `eval perplexity` gives them."""


class Record(BaseModel):
    """A training and what was measured of it. Losses are nats a token; None: not measured, or not finite."""

    model_config = ConfigDict(extra="forbid")

    format: str = FORMAT
    run: str
    stage: str
    lr: float
    seed: int
    fingerprint: str
    """sha256 of everything that decides the numbers: recipe, model, data."""
    status: Status
    reason: str = ""
    """Why it diverged or failed."""
    recipe: dict[str, Any]
    config: dict[str, Any]
    parameters: Annotated[int, Field(ge=0, lt=1 << 63)]
    flops_per_token: float
    """Forward, at the training length."""
    steps: int = 0
    tokens: int = 0
    train_seconds: float = 0.0
    """In steps."""
    seconds: float = 0.0
    """In all: start, steps, validations, checkpoints, evaluations."""
    tokens_per_s: float | None = None
    """Median over the steps."""
    train_loss: float | None = None
    """Mean of the last 5% of the steps."""
    val_loss: float | None = None
    curve: list[tuple[int, float]] = []
    """(step, mean training loss of the steps up to it since the one before)."""
    val_curve: list[tuple[int, float]] = []
    evaluations: list[Measured] = []
    peak_memory: int | None = None
    """Bytes; on a GPU, what tensors took at most in training."""
    peak_memory_evaluation: int | None = None
    device: str = ""
    shared: int = 1
    """Trainings at once on that device: of more than one, the times and speeds tell little."""
    provenance: dict[str, Any] = {}
    """Versions, machine, commit."""
    started: str
    """UTC, ISO 8601."""
    finished: str | None = None

    @property
    def key(self) -> str:
        """``run/stage-lr..-seed..``: where it stands in the study's folder."""
        return job_key(self.run, self.stage, self.lr, self.seed)

    def evaluation(self, name: str) -> Measured | None:
        return next((each for each in self.evaluations if each.name == name), None)

    def write(self, out: Path) -> None:
        """Write ``out/key.json`` atomically."""
        path = record_path(out, self.key)
        checked = Record.model_validate(plain(self.model_dump()))
        write_text(path, checked.model_dump_json(indent=1) + "\n")


def job_key(run: str, stage: str, lr: float, seed: int) -> str:
    return f"{run}/{stage}-lr{lr:g}-seed{seed}"


def record_path(out: Path, key: str) -> Path:
    return out / f"{key}.json"


def read_record(path: Path) -> Record:
    """Raises UserError for a file that is none."""
    try:
        record = Record.model_validate(read_json(path))
    except ValidationError as error:
        raise UserError(f"{path} is no record of a study's run: {explain(error, Record)}") from None
    if record.format != FORMAT:
        raise UserError(f"{path} is no record of a study's run, but {record.format!r}: move it away.")
    return record


def read_records(out: Path) -> dict[str, Record]:
    """Every record in a study's folder, by its key. Raises UserError for a damaged one."""
    found = {}
    for path in sorted(out.glob("*/*-lr*-seed*.json")):
        record = read_record(path)
        if record.key != path.relative_to(out).as_posix().removesuffix(".json"):
            raise UserError(f"{path} is the record of {record.key}: move it there, or away.")
        found[record.key] = record
    return found


def plain(value: Any) -> Any:
    """A copy that JSON can hold: NaN and infinities become None."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {str(key): plain(inner) for key, inner in value.items()}
    return [plain(inner) for inner in value] if isinstance(value, list | tuple) else value


def thin(steps: Sequence[tuple[int, float]], points: int = CURVE_POINTS) -> list[tuple[int, float]]:
    """At most ``points`` of (step, loss), each the mean of an equal share of them, at that share's last step."""
    count = min(points, len(steps))
    edges = [i * len(steps) // count for i in range(count + 1)] if count else []
    return [(steps[b - 1][0], sum(loss for _, loss in steps[a:b]) / (b - a)) for a, b in pairwise(edges)]


def tail_mean(losses: Sequence[float]) -> float | None:
    """Mean of the last 5%, at least one; None of none."""
    last = losses[-max(1, round(TAIL * len(losses))) :]
    return sum(last) / len(last) if last else None
