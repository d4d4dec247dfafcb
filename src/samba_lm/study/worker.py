"""A process that does jobs, one after the other: ``python -m samba_lm.study.worker``, started by the runner.

It reads a job a line from stdin and tells what happens in JSON lines on stdout; whatever else is printed goes to
stderr. It is a process of its own because a job may be killed for its memory or spoil its GPU, and does more than one
because importing PyTorch and starting a GPU take as long as a short training.
"""

from __future__ import annotations

import functools
import gc
import json
import math
import os
import shutil
import signal
import statistics
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO

import torch

from samba_lm import checkpoint
from samba_lm.config import ModelConfig
from samba_lm.data.shards import TokenDataset, open_splits
from samba_lm.errors import UserError, one_line
from samba_lm.eval.perplexity import perplexity
from samba_lm.eval.protocols import OF_DOCUMENTS
from samba_lm.files import write_text
from samba_lm.memory import peak_memory
from samba_lm.model import SambaLM
from samba_lm.plugins import load_plugins
from samba_lm.study.plan import Job, now
from samba_lm.study.process import STOPPED
from samba_lm.study.record import Measured, Record, read_record, record_path, tail_mean, thin
from samba_lm.study.study import Evaluation, documents_measured
from samba_lm.train.checkpoints import list_checkpoints
from samba_lm.train.finite import NonFiniteError
from samba_lm.train.metrics import read_metrics
from samba_lm.train.observer import Observer, Plan, StepRecord
from samba_lm.train.parallel import pick_device
from samba_lm.train.recipe import Recipe
from samba_lm.train.run import train

if TYPE_CHECKING:
    from samba_lm.eval.text import Tokens

Tell = Callable[[Mapping[str, object]], None]
TELL_EVERY = 0.3
"""Seconds between two lines about a job's steps."""

WORSE = 0.25
"""Nats a token that the loss must have risen over a training for it to have diverged, where it stayed finite."""
MOST_MEANS = 512
"""Losses of windows that a record keeps, for comparing two models window by window. Of more windows, those that follow
one another stand together as a group, each group with its mean."""


class Stopped(BaseException):
    """The runner asked to stop, or is gone; what is done is saved. Like KeyboardInterrupt, it may come anywhere."""


def read_job(told: dict[str, Any]) -> Job:
    """A job from what the runner wrote of it."""
    evaluations = tuple((Evaluation.model_validate(each), mark) for each, mark in told["evaluations"])
    recipe, config = Recipe.from_dict(told["recipe"]), ModelConfig.from_dict(told["config"])
    return Job(**{**told, "recipe": recipe, "config": config, "evaluations": evaluations})


@dataclass
class Work:
    """A job on its way."""

    job: Job
    out: Path
    provenance: Mapping[str, object]
    tell: Tell
    stopping: Callable[[], bool] = lambda: False
    shared: int = 1
    """Workers that compute where this one does."""

    def run(self) -> Record:
        """Do what is left of the job and write its record, whatever comes of it. Raises Stopped."""
        began = time.monotonic()
        path = record_path(self.out, self.job.key)
        record = read_record(path) if path.exists() else None
        if record is None or not self.job.trained(record) or not list_checkpoints(self.folder):
            record = self.job.new_record(self.provenance)
        spent = record.seconds

        def write() -> None:
            record.seconds = spent + time.monotonic() - began
            record.write(self.out)

        try:
            device = pick_device(self.job.recipe.train.device)
            if not self.job.trained(record):
                self._train(record, device)
                _clean()
                write()
            self._evaluate(record, device, write)
            record.status, record.reason = "done", ""
        except NonFiniteError as error:
            # What train() adds, where the last checkpoint is, is soon untrue.
            record.status, record.reason = "diverged", one_line(str(error.__context__ or error))
        except (UserError, torch.OutOfMemoryError, OSError) as error:
            record.status, record.reason = "failed", reason_of(error)
        record.finished = now()
        write()
        self._tidy(record)
        return record

    @property
    def folder(self) -> Path:
        """The training's own."""
        return Path(self.job.recipe.train.out)

    def _train(self, record: Record, device: torch.device) -> None:
        self._own_folder()
        record.device, record.shared = device_name(device), self._most_shared()
        with peak(device) as most:
            result = train(self.job.recipe, observer=Telling(self.tell), stop=self.stopping)
        if result.steps < self.job.steps:
            raise Stopped
        record.peak_memory = most()
        record.steps, record.tokens, record.train_seconds = result.steps, result.tokens, result.seconds
        record.val_loss = result.val_loss
        metrics = read_metrics(self.folder / "metrics.jsonl")
        losses = [(int(each["step"]), each["loss"]) for each in metrics if "loss" in each]
        record.train_loss = tail_mean([loss for _, loss in losses])
        record.curve = thin(losses)
        record.val_curve = [(int(each["step"]), each["val_loss"]) for each in metrics if "val_loss" in each]
        # The first steps compile kernels; the median does not know them.
        record.tokens_per_s = statistics.median(each["tokens_per_s"] for each in metrics)
        record.status, record.reason = "trained", ""
        self._check_loss(losses[0][1], record.train_loss)

    def _check_loss(self, first: float, last: float | None) -> None:
        """A loss may stay finite and yet be worse than that of random weights."""
        if last is not None and last > first + WORSE:
            raise NonFiniteError(
                f"the training loss rose from {first:.3f} to {last:.3f}: the learning rate {self.job.lr:g} is too high"
            )

    def _own_folder(self) -> None:
        """Of another recipe's or data's run nothing is continued."""
        mark = self.folder / "fingerprint"
        if self.folder.exists() and (not mark.is_file() or mark.read_text(encoding="utf-8") != self.job.fingerprint):
            shutil.rmtree(self.folder)
        write_text(mark, self.job.fingerprint)

    def _most_shared(self) -> int:
        """Trainings at once on the device, the most since this one began: it may have been alone only after a stop."""
        mark = self.folder / "shared"
        most = max(self.shared, int(mark.read_text(encoding="utf-8")) if mark.is_file() else 1)
        write_text(mark, f"{most}")
        return most

    def _evaluate(self, record: Record, device: torch.device, write: Callable[[], None]) -> None:
        wanted = {mark for _, mark in self.job.evaluations}
        record.evaluations = [each for each in record.evaluations if each.fingerprint in wanted]
        missing = self.job.missing(record)
        if not missing:
            return
        model = self._model(device, max(max(evaluation.lengths) for evaluation, _ in missing))
        with peak(device) as most:
            for evaluation, mark in missing:
                began = time.monotonic()
                results = self._measure(model, evaluation)
                seconds = time.monotonic() - began
                record.evaluations.append(
                    Measured(name=evaluation.name, fingerprint=mark, seconds=seconds, results=results)
                )
                write()
        record.peak_memory_evaluation = most()

    def _model(self, device: torch.device, longest: int) -> SambaLM:
        """The trained model, computing as it did in training: fp32 weights, cast where they are used."""
        context = max(self.job.config.max_context, longest)
        model, _ = checkpoint.load(self.folder, device=device, max_context=context)
        model.compute_dtype = getattr(torch, self.job.recipe.train.dtype)
        return model

    def _measure(self, model: SambaLM, evaluation: Evaluation) -> list[dict[str, Any]]:
        settings = evaluation.settings()
        lengths = evaluation.lengths_for(model.config.constant_state)
        text, limit = same_text(evaluation, lengths)

        def progress(done: int, total: int) -> None:
            self.tell({"event": "evaluating", "name": evaluation.name, "done": done, "total": total})
            if self.stopping():
                raise Stopped

        results = perplexity(
            model,
            text,
            lengths,
            protocol=settings.protocol,
            stride=settings.stride,
            window=settings.window,
            max_tokens=limit,
            documents=settings.documents,
            tokenizer=open_data(evaluation.data).tokenizer,
            progress=progress,
        )
        return [compact(asdict(result)) for result in results]

    def _tidy(self, record: Record) -> None:
        """Leave of the run's folder what is needed: to go on where it failed, the weights where they are kept."""
        if record.status == "failed" or not self.folder.exists():
            return
        if record.status == "diverged" or not self.job.keep:
            shutil.rmtree(self.folder)
            return
        for folder in list_checkpoints(self.folder):
            (folder / "optimizer.safetensors").unlink(missing_ok=True)


def compact(result: dict[str, Any]) -> dict[str, Any]:
    """A length's result without what only fills the file: where windows begin, and each one's mean where they are many.

    Then ``means`` are those of groups of ``group`` windows (the last of as many as are left).
    """
    means = result.pop("means")
    del result["starts"]
    if not all(map(math.isfinite, means)):
        return result | {"means": []}
    group = max(1, math.ceil(len(means) / MOST_MEANS))
    grouped = [means[i : i + group] for i in range(0, len(means), group)]
    told = {"means": [round(math.fsum(some) / len(some), 6) for some in grouped]}
    return result | told | ({"group": group} if group > 1 else {})


def open_data(folder: str) -> TokenDataset:
    """Prepared data; of train and val, val."""
    first, val = open_splits(folder)
    return val or first


def same_text(evaluation: Evaluation, lengths: Sequence[int]) -> tuple[Tokens, int | None]:
    """What a model is measured on that is measured at these of the evaluation's lengths, and its bound in tokens.

    Documents that must reach the longest length are the same for every model, also one that is not measured there.
    """
    dataset, settings = open_data(evaluation.data), evaluation.settings()
    if settings.protocol not in OF_DOCUMENTS or settings.documents == "every":
        return dataset, settings.max_tokens
    documents, longest = documents_measured(evaluation, dataset)
    if not documents or longest in lengths:
        return dataset, settings.max_tokens
    return [dataset.document(i) for i in documents], None


class Telling(Observer):
    """Tells the runner of a training's steps."""

    def __init__(self, tell: Tell) -> None:
        self.tell = tell

    def started(self, plan: Plan) -> None:
        self.plan = plan
        self.tell({"event": "training", "step": plan.first_step, "steps": plan.steps, "device": plan.device})

    def step(self, record: StepRecord) -> None:
        figures = {"loss": record.loss, "tokens_per_s": record.tokens_per_s}
        self.tell({"event": "step", "step": record.step, "steps": self.plan.steps, **figures})

    def message(self, text: str) -> None:
        print(text, file=sys.stderr)


class peak:  # noqa: N801 - reads like a function
    """``with peak(device) as most:`` afterwards ``most()`` is how many bytes were taken at most meanwhile.

    On a GPU by tensors; elsewhere by the process since it began, which does not forget.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device

    def __enter__(self) -> Callable[[], int]:
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)
            return lambda: int(torch.cuda.max_memory_allocated(self.device))
        return peak_memory

    def __exit__(self, *_: object) -> None:
        pass


def device_name(device: torch.device) -> str:
    """The GPU's name, or "cpu"."""
    return str(torch.cuda.get_device_name(device)) if device.type == "cuda" else device.type


def reason_of(error: BaseException) -> str:
    """An error in a line."""
    text = one_line(str(error)) or "no details"
    return text if isinstance(error, UserError) else f"{type(error).__name__}: {text}"


class Events:
    """Lines for the runner; of those of one kind, as many as it can show."""

    def __init__(self, stream: TextIO) -> None:
        self.stream = stream
        self.gone = False
        """Whether nobody reads them any more."""
        self.last: tuple[object, float] = ("", 0.0)

    def tell(self, event: Mapping[str, object]) -> None:
        moment = time.monotonic()
        kind, when = self.last
        if event["event"] == kind and moment - when < TELL_EVERY:
            return
        self.last = event["event"], moment
        try:
            self.stream.write(json.dumps(event) + "\n")
            self.stream.flush()
        except BrokenPipeError:
            self.gone = True


def serve(lines: TextIO, events: Events) -> int:
    """Do the jobs of ``lines``; the exit code. A job that fails ends the process: the next gets a fresh one."""
    for line in lines:
        told = json.loads(line)
        work = Work(
            read_job(told["job"]),
            Path(told["out"]),
            told["provenance"],
            events.tell,
            stopping=functools.partial(_is_alone, events, int(told["runner"])),
            shared=int(told["shared"]),
        )
        record = work.run()
        events.tell({"event": "ended", "status": record.status, "reason": record.reason})
        if record.status == "failed" or events.gone:
            return 1
        if work.job.recipe.train.compile:
            torch.compiler.reset()
        _clean()
    return 0


def _is_alone(events: Events, runner: int) -> bool:
    return events.gone or os.getppid() != runner


def _clean() -> None:
    """Give a training's memory back before what comes next."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def main() -> int:
    """Run as a process."""

    def stop(number: int, frame: object) -> None:
        raise Stopped

    signal.signal(signal.SIGTERM, stop)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    events = Events(os.fdopen(os.dup(1), "w", encoding="utf-8"))
    os.dup2(2, 1)  # whatever a library prints is no event
    try:
        load_plugins()
        return serve(sys.stdin, events)
    except Stopped:
        return STOPPED


if __name__ == "__main__":
    sys.exit(main())
