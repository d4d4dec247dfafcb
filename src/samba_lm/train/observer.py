"""How a run is watched: the loop tells observers what happens, and knows nothing of files or screens."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Plan:
    """What is about to run."""

    name: str
    """The model's name."""
    parameters: int
    device: str
    first_step: int
    """Steps already done: 0, or those of the checkpoint that is continued."""
    steps: int
    tokens_per_step: int


@dataclass(frozen=True)
class StepRecord:
    """One optimizer step."""

    step: int
    """Steps done, this one included: the first is 1."""
    tokens: int
    """Tokens read since the beginning of the run."""
    loss: float
    """Mean loss of this step's tokens, nats."""
    lr: float
    grad_norm: float
    """Global norm before clipping."""
    tokens_per_s: float
    mfu: float | None
    """Model FLOPs utilisation, 0 to 1; None where the device's peak is not known."""
    val_loss: float | None = None
    """Mean loss on validation tokens, nats, when this step was followed by a validation."""


class Observer:
    """Does nothing; override what matters to you. Calls come in the order of the methods here."""

    def started(self, plan: Plan) -> None:
        """Training starts or continues."""

    def step(self, record: StepRecord) -> None:
        """A step is done, and its validation if one was due."""

    def saving(self) -> None:
        """A checkpoint is about to be written."""

    def saved(self, step: int, folder: Path) -> None:
        """It is on the disk."""

    def message(self, text: str) -> None:
        """A sentence for people."""

    def stopped(self) -> None:
        """Training ended or failed; called exactly once after ``started``."""


class Observers(Observer):
    """Several observers as one."""

    def __init__(self, members: Sequence[Observer]) -> None:
        self.members = tuple(members)

    def started(self, plan: Plan) -> None:
        for member in self.members:
            member.started(plan)

    def step(self, record: StepRecord) -> None:
        for member in self.members:
            member.step(record)

    def saving(self) -> None:
        for member in self.members:
            member.saving()

    def saved(self, step: int, folder: Path) -> None:
        for member in self.members:
            member.saved(step, folder)

    def message(self, text: str) -> None:
        for member in self.members:
            member.message(text)

    def stopped(self) -> None:
        for member in self.members:
            member.stopped()
