"""How a run is watched: the loop tells observers what happens, and knows nothing of files or screens."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
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
    world: int = 1
    """Processes that train together."""
    mesh: Mapping[str, int] = field(default_factory=dict)
    """How they share the work: sizes of "replicate", "shard" and "context"; empty where one does all."""
    length: int | None = None
    """Tokens of the longest rows."""


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
    """Mean loss on validation tokens, nats, when a validation followed this step; of several sets the first one's."""
    val_losses: Mapping[str, float] = field(default_factory=dict)
    """That of each set by its name, where sets have names."""
    tokens_per_s_per_gpu: float | None = None
    """Of one process, which has one GPU (or computes on the CPU)."""
    data_wait_s: float | None = None
    """Time that the main process waited for the step's batch, seconds."""
    length: int | None = None
    """Tokens of this step's rows, on which its loss depends where a recipe has rows of several lengths."""
    memory_peak: int | None = None
    """Bytes taken by the main process's tensors on its GPU at most so far; on a CPU, of its resident memory."""
    memory_reserved: int | None = None
    """Bytes that its allocator held on the GPU at most; None on a CPU."""
    grad_norms: Mapping[str, float] = field(default_factory=dict)
    """The norm of each group of parameters before clipping, on steps that are logged: embedding, head, norms, and the
    layers by their kind (mamba, attention, mlp, ...)."""
    refused: bool = False
    """Whether the guard left this step's update out."""
    skipped: int | None = None
    """Updates left out since the beginning of the run; None without guard."""
    rollbacks: int | None = None
    """Times that the run went back to a checkpoint; None without guard."""


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

    def returned(self, step: int) -> None:
        """The run went back to its checkpoint after ``step``; the steps after it come anew, with other batches."""

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

    def returned(self, step: int) -> None:
        for member in self.members:
            member.returned(step)

    def message(self, text: str) -> None:
        for member in self.members:
            member.message(text)

    def stopped(self) -> None:
        for member in self.members:
            member.stopped()
