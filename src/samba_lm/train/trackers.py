"""The figures of a run for programs that draw them: TensorBoard, Weights & Biases."""

from __future__ import annotations

import math
import secrets
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from samba_lm.errors import UserError
from samba_lm.files import write_text
from samba_lm.train.observer import Observer, Plan, StepRecord

if TYPE_CHECKING:
    import wandb
    from torch.utils.tensorboard import SummaryWriter


def scalars(record: StepRecord, every: int) -> dict[str, float]:
    """What is drawn of a step, by name: validations always, the rest every ``every`` steps."""
    found: dict[str, float | None] = {"loss/val": record.val_loss}
    found |= {f"loss/val/{name}": loss for name, loss in record.val_losses.items() if name}
    if record.step % every == 0:
        found |= {
            "loss/train": record.loss,
            "length": record.length,
            "lr": record.lr,
            "grad_norm": record.grad_norm,
            "tokens_per_s": record.tokens_per_s,
            "tokens_per_s_per_gpu": record.tokens_per_s_per_gpu,
            "mfu": record.mfu,
            "data_wait_s": record.data_wait_s,
            "memory_peak": record.memory_peak,
            "memory_reserved": record.memory_reserved,
            "skipped": record.skipped,
            "rollbacks": record.rollbacks,
        }
        found |= {f"grad_norm/{name}": norm for name, norm in record.grad_norms.items()}
    return {name: value for name, value in found.items() if value is not None and math.isfinite(value)}


class TensorBoardMetrics(Observer):
    """TensorBoard's event files. Raises UserError where the extra is not installed."""

    def __init__(self, folder: Path, every: int) -> None:
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError:
            raise UserError(
                "train.tensorboard = true needs TensorBoard: pip install 'samba-lm[tensorboard]', or set it to false."
            ) from None
        self.folder = folder
        self.every = every
        self.make_writer = SummaryWriter
        self.writer: SummaryWriter | None = None

    def started(self, plan: Plan) -> None:
        self._open(plan.first_step)

    def step(self, record: StepRecord) -> None:
        if self.writer is not None:
            for name, value in scalars(record, self.every).items():
                self.writer.add_scalar(name, value, record.step)

    def returned(self, step: int) -> None:
        self.stopped()
        self._open(step)

    def stopped(self) -> None:
        if self.writer is not None:
            self.writer.close()

    def _open(self, step: int) -> None:
        """Go on after ``step``: what is there of later ones is no longer shown."""
        self.writer = self.make_writer(str(self.folder), purge_step=step + 1)


class WandbMetrics(Observer):
    """A run of Weights & Biases, which a continued training continues. Raises UserError where the extra is missing.

    Files and the run's name lie in ``folder``. Curves are drawn over ``step``; of steps that a continued run made
    again, both points are shown. ``tell`` is told where the run is found.
    """

    def __init__(
        self, folder: Path, every: int, project: str, config: dict[str, Any], tell: Callable[[str], None]
    ) -> None:
        try:
            import wandb
        except ImportError:
            raise UserError(
                f"train.wandb = {project!r} needs Weights & Biases: pip install 'samba-lm[wandb]', or leave it out."
            ) from None
        self.folder, self.every, self.project, self.config, self.tell = folder, every, project, config, tell
        self.wandb = wandb
        self.run: wandb.Run | None = None

    def started(self, plan: Plan) -> None:
        name = self.folder / "run-id"
        if not name.is_file():
            self.folder.mkdir(parents=True, exist_ok=True)
            write_text(name, secrets.token_hex(4) + "\n")
        try:
            self.run = self.wandb.init(
                project=self.project,
                id=name.read_text(encoding="utf-8").strip(),
                resume="allow",
                dir=self.folder.parent,
                config={**self.config, "parameters": plan.parameters, "world": plan.world},
                # Its own lines would go through the live view, and the live view's into its log.
                settings=self.wandb.Settings(silent=True, console="off"),
            )
        except self.wandb.Error as error:
            raise UserError(
                f"Weights & Biases did not start ({str(error).splitlines()[0]}): run `wandb login`, set "
                "WANDB_MODE=offline, or leave train.wandb out."
            ) from None
        if not self.run.disabled:
            offline = f"offline; `wandb sync {Path(self.run.dir).parent}` sends it"
            self.tell(f"Weights & Biases: run {self.run.id}, {offline if self.run.offline else self.run.url}")
        self.run.define_metric("step", hidden=True)
        self.run.define_metric("*", step_metric="step")

    def step(self, record: StepRecord) -> None:
        found = scalars(record, self.every)
        if self.run is not None and found:
            self.run.log({**found, "step": record.step})

    def stopped(self) -> None:
        if self.run is not None:
            self.run.finish()
