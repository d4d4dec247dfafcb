"""A run in a folder: data, model and optimizer from a recipe, checkpoints on the way, and exact continuation.

Of several processes each runs this; the main one alone makes, holds and clears the folder, and speaks.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path

import torch

from samba_lm import checkpoint
from samba_lm.data.columns import part_length
from samba_lm.errors import UserError
from samba_lm.model import SambaLM
from samba_lm.train import checkpoints
from samba_lm.train.checkpoints import Saver, TrainerState
from samba_lm.train.data import Data, open_data
from samba_lm.train.finite import NonFiniteError
from samba_lm.train.interrupt import StopRequest, stop_on_signals
from samba_lm.train.loop import Progress, fit
from samba_lm.train.lora import export_adapters
from samba_lm.train.metrics import JsonlMetrics
from samba_lm.train.observer import Observer, Observers
from samba_lm.train.parallel import Parallel, connect
from samba_lm.train.prepare import make_optimizer, prepare_model
from samba_lm.train.recipe import Recipe
from samba_lm.train.resume import Resume, find_resume, put_newer_aside
from samba_lm.train.start import starting_model, tell_resume
from samba_lm.train.step import pieces
from samba_lm.train.together import together
from samba_lm.train.trackers import TensorBoardMetrics, WandbMetrics


@dataclass(frozen=True)
class TrainResult:
    """How a run ended."""

    final_loss: float
    """Loss of the last step, nats a token."""
    val_loss: float | None
    """Last validation loss, nats a token."""
    steps: int
    """Steps done since the beginning of the run."""
    tokens: int
    seconds: float
    """Time spent in steps, over all parts of the run."""
    folder: Path
    """The newest checkpoint."""
    device: str
    interrupted: int | None = None
    """The signal that ended the run early."""


def train(
    recipe: Recipe,
    *,
    model: SambaLM | None = None,
    observer: Observer | None = None,
    fresh: bool = False,
    resume: Path | None = None,
    stop: Callable[[], bool] = lambda: False,
) -> TrainResult:
    """Train as ``recipe`` says, into its ``train.out``; a run found there is continued bit for bit.

    ``model`` (its config decides, its weights are trained in place) stands in for the one that the recipe would make.
    ``fresh`` moves an earlier run aside and starts over. ``resume``: go on from this step's folder, of this run or,
    where train.out has none yet, of another; None: from the newest that is whole. Ctrl-C, SIGTERM, SIGHUP and a true
    ``stop()`` end the run after the current step, with a checkpoint. Raises UserError for whatever the user can put
    right: settings, data, a checkpoint of another model, tokenizer or data, a full disk, a loss that is not finite.

    Under torchrun all its processes call this. A UserError of one is raised on all; a process that ends otherwise is
    noticed by torchrun, or by the others after ``parallel.timeout``.
    """
    if fresh and resume is not None:
        raise UserError("Starting over and going on from a checkpoint exclude each other: give --fresh or --resume.")
    parallel = connect(recipe.train.device, recipe.parallel)
    with parallel.joined():
        pieces(recipe.train, parallel)
        if parallel.context is not None:
            _check_parts(recipe, parallel.context.count)
        observer = observer if observer is not None and parallel.is_main else Observer()
        with together(parallel):
            data = open_data(recipe, parallel.data_rank, parallel.data_world)
        with _held(Path(recipe.train.out), parallel, observer, fresh):
            return _train(recipe, parallel, data, model, observer, resume, stop)


def _check_parts(recipe: Recipe, count: int) -> None:
    """Raise UserError unless ``count`` processes can share the rows of every length that comes in the run."""
    part_length(recipe.train.length, count)
    made = recipe.data.recall
    for length in made.lengths if made is not None else ():
        try:
            part_length(length, count)
        except UserError as error:
            key = "passkey" if made is recipe.data.passkey else "phonebook"
            raise UserError(f"data.{key}.lengths: {error}") from None


def _train(
    recipe: Recipe,
    parallel: Parallel,
    data: Data,
    model: SambaLM | None,
    observer: Observer,
    resume: Path | None,
    stop: Callable[[], bool],
) -> TrainResult:
    out, steps = Path(recipe.train.out), recipe.train.total_steps
    found = find_resume(out, resume, steps, parallel)
    with together(parallel):
        model = starting_model(recipe, data, found, model)
    for note in data.notes:
        observer.message(note)
    if found is not None and found.state.step >= steps:
        observer.message(f"{found.folder} has all {steps} steps: raise train.steps to go on.")
        return _result(_progress(found.state), found.folder, parallel)
    run = Run(recipe, parallel, data, model, observer, found)
    with stop_on_signals(tell=parallel.is_main) as request:
        progress = run.train(request, stop)
    if data.tokens_read is not None:
        read = data.tokens_read(progress.step + progress.guard.passed)
        observer.message(f"Tokens read: {', '.join(f'{name} {tokens:,}' for name, tokens in read.items())}.")
    with together(parallel):
        adapter = export_adapters(model, recipe, data.tokenizer) if parallel.is_main else None
    if adapter is not None:
        observer.message(f"The adapters alone, in peft's format, are in {adapter}.")
    signal = parallel.largest(request.signal or 0)  # whichever process caught one
    assert run.latest is not None, "the loop saves after its last step"
    return _result(progress, run.latest, parallel, interrupted=signal if signal and progress.step < steps else None)


class Run:
    """The model, its optimizer and their checkpoints while they are trained. Made and called by all processes alike.

    ``latest``: the newest checkpoint that is complete, None before the first.
    """

    def __init__(
        self,
        recipe: Recipe,
        parallel: Parallel,
        data: Data,
        model: SambaLM,
        observer: Observer,
        found: Resume | None,
    ) -> None:
        self.recipe, self.parallel, self.data, self.model, self.observer = recipe, parallel, data, model, observer
        self.out, settings = Path(recipe.train.out), recipe.train
        if found is not None:
            put_newer_aside(found, parallel, observer)
            tell_resume(found, recipe, parallel, observer)
        prepare_model(model, settings, parallel)
        self.optimizer = make_optimizer(model, settings)
        self.start = Progress() if found is None else self._restore(found)
        self.latest = None if found is None else found.folder
        with together(parallel):
            watchers = [*_metrics(self.out, recipe, observer), observer] if parallel.is_main else []
        self.watchers = Observers(watchers)
        self.saver = Saver(
            self.out,
            data.tokenizer,
            parallel,
            keep=settings.keep,
            keep_every=settings.keep_every,
            timeout=recipe.parallel.timeout,
        )

    def train(self, request: StopRequest, stop: Callable[[], bool]) -> Progress:
        """Go on to the recipe's last step, or until a signal or ``stop`` asks to stop."""

        def stopping() -> bool:
            self._saved(self.saver.poll())  # asked by every process after every step
            return bool(request) or stop()

        try:
            progress = fit(
                self.model,
                self.data.loader,
                self.recipe.train,
                val=self.data.val,
                optimizer=self.optimizer,
                parallel=self.parallel,
                start=self.start,
                observer=self.watchers,
                save=self._save,
                stop=stopping,
                back=self._go_back,
            )
            self._saved(self.saver.wait())
        except NonFiniteError as error:
            self.saver.finish()
            good = checkpoint.latest_step(self.out) or self.latest
            raise NonFiniteError(f"{error} Last good checkpoint: {good or 'none yet'}.") from None
        except BaseException:
            self.saver.abandon()
            raise
        return progress

    def _save(self, progress: Progress) -> None:
        self.watchers.saving()
        self._saved(self.saver.wait())
        state = _state(progress, self.recipe, self.model, self.data, self.parallel)
        self._saved(self.saver.save(self.model, self.optimizer, state))

    def _saved(self, folder: Path | None) -> None:
        """Take note of a save that is complete, if one is."""
        if folder is not None:
            self.latest = folder
            self.watchers.saved(checkpoints.step_of(folder), folder)

    def _go_back(self) -> Progress | None:
        """To the last checkpoint; None where there is none."""
        self._saved(self.saver.wait())
        there = find_resume(self.out, None, self.recipe.train.total_steps, self.parallel)
        if there is None:
            return None
        put_newer_aside(there, self.parallel, self.observer)
        return self._restore(there)

    def _restore(self, found: Resume) -> Progress:
        parallel = self.parallel
        checkpoints.restore_model(found.folder, self.model, parallel)
        checkpoints.restore_optimizer(found.folder, self.model, self.optimizer, parallel)
        checkpoints.restore_rng(found.folder, found.state, self.recipe.train.seed, parallel.rank, parallel.device)
        return _progress(found.state)


@contextlib.contextmanager
def _held(out: Path, parallel: Parallel, observer: Observer, fresh: bool) -> Iterator[None]:
    """The run's folder, made, cleared and locked by the main process before any other looks at it."""
    with contextlib.ExitStack() as held:
        with together(parallel):
            if parallel.is_main:
                if fresh:
                    _move_aside(out, observer)
                held.enter_context(checkpoints.run_folder(out))
        yield


def _result(progress: Progress, folder: Path, parallel: Parallel, interrupted: int | None = None) -> TrainResult:
    return TrainResult(
        final_loss=progress.loss,
        val_loss=progress.val_loss,
        steps=progress.step,
        tokens=progress.tokens,
        seconds=progress.seconds,
        folder=folder,
        device=str(parallel.device),
        interrupted=interrupted,
    )


def _progress(state: TrainerState) -> Progress:
    return Progress(
        step=state.step,
        tokens=state.tokens,
        seconds=state.seconds,
        loss=state.loss,
        val_loss=state.val_loss,
        best_val_loss=state.best_val_loss,
        guard=state.guard,
    )


def _state(progress: Progress, recipe: Recipe, model: SambaLM, data: Data, parallel: Parallel) -> TrainerState:
    return TrainerState(
        step=progress.step,
        tokens=progress.tokens,
        seconds=progress.seconds,
        loss=progress.loss,
        val_loss=progress.val_loss,
        best_val_loss=progress.best_val_loss,
        guard=progress.guard,
        recipe=recipe.to_dict(),
        config=model.config.fingerprint(),
        tokenizer=data.tokenizer.fingerprint(),
        data=data.fingerprint,
        threads=torch.get_num_threads(),
        rng={str(parallel.rank): checkpoints.rng_state(parallel.device)},
    )


def _metrics(out: Path, recipe: Recipe, observer: Observer) -> list[Observer]:
    every = recipe.train.log_every
    metrics: list[Observer] = [JsonlMetrics(out / "metrics.jsonl", every)]
    if recipe.train.tensorboard:
        metrics.append(TensorBoardMetrics(out / "tensorboard", every))
    if recipe.train.wandb is not None:
        metrics.append(WandbMetrics(out / "wandb", every, recipe.train.wandb, recipe.to_dict(), observer.message))
    return metrics


def _move_aside(out: Path, observer: Observer) -> None:
    if out.exists():
        checkpoints.check_is_run(out)
        with checkpoints.run_folder(out):
            aside = out.with_name(f"{out.name}.before-{datetime.now():%Y%m%d-%H%M%S}")
            out.rename(aside)
        observer.message(f"Starting over; the earlier run is now in {aside}.")
