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
from samba_lm.config import ModelConfig
from samba_lm.errors import UserError
from samba_lm.model import SambaLM
from samba_lm.train import checkpoints
from samba_lm.train.checkpoints import Saver, TrainerState
from samba_lm.train.data import Data, open_data
from samba_lm.train.finite import NonFiniteError
from samba_lm.train.interrupt import stop_on_signals
from samba_lm.train.loop import Progress, fit
from samba_lm.train.lora import adapt, export_adapters
from samba_lm.train.metrics import JsonlMetrics
from samba_lm.train.observer import Observer, Observers
from samba_lm.train.parallel import Parallel, connect
from samba_lm.train.prepare import make_optimizer, prepare_model
from samba_lm.train.recipe import Recipe
from samba_lm.train.resume import Resume, find_resume, put_newer_aside
from samba_lm.train.slow_channels import slow_channels
from samba_lm.train.step import pieces
from samba_lm.train.together import together
from samba_lm.train.trackers import TensorBoardMetrics, WandbMetrics

FIXED = (
    *("train.batch_size", "train.length", "train.seed"),
    *("data.documents", "data.passkey", "data.phonebook", "data.mixture", "data.shuffle_shards"),
    *("model.slow_channels", "train.optimizer", "lora"),
)
"""Fields, or sections, that decide which tokens step n reads (a run continued with others would skip or repeat data),
or how the run began."""

FREE = (
    *("train.out", "train.tensorboard", "train.wandb", "train.log_every", "train.save_every", "train.keep"),
    "train.keep_every",
    *("data.train", "data.val", "data.tokenizer", "data.chat.files", "data.chat.val"),
    *("data.cache", "data.cache_gb"),
)
"""Fields that may change without a word: the numbers do not depend on them, or are checked otherwise (data)."""


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
        return _train(recipe, parallel, model, observer or Observer(), fresh, resume, stop)


def _train(
    recipe: Recipe,
    parallel: Parallel,
    model: SambaLM | None,
    observer: Observer,
    fresh: bool,
    resume: Path | None,
    stop: Callable[[], bool],
) -> TrainResult:
    settings = recipe.train
    steps = settings.total_steps
    out = Path(settings.out)
    pieces(settings, parallel)
    if not parallel.is_main:
        observer = Observer()
    with together(parallel):
        data = open_data(recipe, parallel.data_rank, parallel.data_world)
    with _held(out, parallel, observer, fresh):
        found = find_resume(out, resume, steps, parallel)
        # Before anything is made: a mixer of the user's own may draw from the default generator.
        torch.manual_seed(settings.seed)
        with together(parallel):
            if found is None:
                model = model or _new_model(recipe, data)
                _check_vocab(model.config, data)
            else:
                model = _saved_model(found, recipe, data, model)
        adapt(model, recipe)
        for note in data.notes:
            observer.message(note)
        if found is not None and found.state.step >= steps:
            observer.message(f"{found.folder} has all {steps} steps: raise train.steps to go on.")
            return _result(_progress(found.state), found.folder, parallel)
        if found is not None:
            put_newer_aside(found, parallel, observer)
            _tell_resume(found, recipe, parallel, observer)
        prepare_model(model, settings, parallel)
        optimizer = make_optimizer(model, settings)
        progress = Progress()

        def restore(found: Resume) -> Progress:
            checkpoints.restore_model(found.folder, model, parallel)
            checkpoints.restore_optimizer(found.folder, model, optimizer, parallel)
            checkpoints.restore_rng(found.folder, found.state, settings.seed, parallel.rank, parallel.device)
            return _progress(found.state)

        if found is not None:
            progress = restore(found)

        with together(parallel):
            watchers = Observers([*_metrics(out, recipe, observer), observer] if parallel.is_main else [])
        saver = Saver(
            out,
            data.tokenizer,
            parallel,
            keep=settings.keep,
            keep_every=settings.keep_every,
            timeout=recipe.parallel.timeout,
        )
        latest = None if found is None else found.folder

        def saved(folder: Path | None) -> None:
            nonlocal latest
            if folder is not None:
                latest = folder
                watchers.saved(checkpoints.step_of(folder), folder)

        def save(progress: Progress) -> None:
            watchers.saving()
            saved(saver.wait())
            saved(saver.save(model, optimizer, _state(progress, recipe, model, data, parallel)))

        def stopping() -> bool:
            saved(saver.poll())  # asked by every process after every step
            return bool(request) or stop()

        def back() -> Progress | None:
            saved(saver.wait())
            there = find_resume(out, None, steps, parallel)
            if there is None:
                return None
            put_newer_aside(there, parallel, observer)
            return restore(there)

        with stop_on_signals(tell=parallel.is_main) as request:
            try:
                progress = fit(
                    model,
                    data.loader,
                    settings,
                    val=data.val,
                    optimizer=optimizer,
                    parallel=parallel,
                    start=progress,
                    observer=watchers,
                    save=save,
                    stop=stopping,
                    back=back,
                )
                saved(saver.wait())
            except NonFiniteError as error:
                saver.finish()
                good = checkpoint.latest_step(out) or latest
                raise NonFiniteError(f"{error} Last good checkpoint: {good or 'none yet'}.") from None
            except BaseException:
                saver.abandon()
                raise
    assert latest is not None, "the loop saves after its last step"
    if data.tokens_read is not None:
        read = data.tokens_read(progress.step + progress.guard.passed)
        observer.message(f"Tokens read: {', '.join(f'{name} {tokens:,}' for name, tokens in read.items())}.")
    with together(parallel):
        adapter = export_adapters(model, recipe, data.tokenizer) if parallel.is_main else None
    if adapter is not None:
        observer.message(f"The adapters alone, in peft's format, are in {adapter}.")
    signal = parallel.largest(request.signal or 0)  # whichever process caught one
    return _result(progress, latest, parallel, interrupted=signal if signal and progress.step < steps else None)


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


def _new_model(recipe: Recipe, data: Data) -> SambaLM:
    source = recipe.model.init_from
    if source is None:
        model = checkpoint.create(_wanted_config(recipe, data), seed=recipe.train.seed)
        slow_channels(model, recipe.model.slow_channels, recipe.train.seed)
        return model
    model, tokenizer = checkpoint.load(source, dtype=torch.float32)
    if tokenizer is not None and tokenizer.fingerprint() != data.tokenizer.fingerprint():
        raise UserError(
            f"model.init_from = {source!r} has another tokenizer than {_data_name(recipe)}: take "
            f"{source}/tokenizer.json (data prepare --tokenizer, or data.tokenizer)."
        )
    return model


def _wanted_config(recipe: Recipe, data: Data) -> ModelConfig:
    if recipe.model.init_from is not None:
        return _new_model(recipe, data).config
    return recipe.model.config(data.tokenizer.vocab_size)


def _saved_model(found: Resume, recipe: Recipe, data: Data, model: SambaLM | None) -> SambaLM:
    """A model to go on with, its weights still to be read, after checking that the checkpoint belongs to this recipe,
    model and data."""
    folder, state = found.folder, found.state
    remedy = "set train.out to another folder, or start over with --fresh"
    saved, _ = checkpoint.read_config(folder)
    changes = recipe.differences(state.recipe)
    if model is not None or any(field.startswith("model.") for field in changes):
        wanted = model.config if model is not None else _wanted_config(recipe, data)
        if wanted.fingerprint() != saved.fingerprint():
            raise UserError(f"{folder} holds another model: {_difference(saved, wanted)}; {remedy}.")
    if state.tokenizer != data.tokenizer.fingerprint():
        raise UserError(
            f"{folder} was trained with tokenizer {state.tokenizer[:12]}, but {_data_name(recipe)} "
            f"has {data.tokenizer.fingerprint()[:12]}; {remedy}."
        )
    for field, (now, before) in changes.items():
        if field.startswith(FIXED) and not _is_free(field):
            raise UserError(f"{folder} was trained with {field} = {before}, not {now}; {remedy}.")
    if state.data != data.fingerprint:
        read = state.recipe["data"]
        before = f"data.mixture ({', '.join(read['mixture'])})" if read.get("mixture") else repr(read.get("train"))
        if read.get("chat"):
            before = ", ".join(map(repr, read["chat"]["files"]))
        raise UserError(
            f"{folder} was trained on data {state.data[:12]} ({before}), but "
            f"{_data_name(recipe)} is {data.fingerprint[:12]}; {remedy}, or fine-tune with model.init_from."
        )
    return model or checkpoint.build(saved)


def _is_free(field: str) -> bool:
    """Whether it may change without a word."""
    return field in FREE or (field.startswith("data.mixture.") and field.endswith(".path"))


def _tell_resume(found: Resume, recipe: Recipe, parallel: Parallel, observer: Observer) -> None:
    state = found.state
    observer.message(f"Continuing from {found.folder}, step {state.step} of {recipe.train.total_steps}.")
    for field, (now, before) in recipe.differences(state.recipe).items():
        if not _is_free(field):
            observer.message(f"Changed since the checkpoint: {field} = {now}, was {before}.")
    if state.world != parallel.world:
        observer.message(
            f"With {_processes(parallel.world)} instead of {_processes(state.world)} the last digits will differ."
        )
    if state.threads != torch.get_num_threads():
        observer.message(
            f"With {torch.get_num_threads()} CPU threads instead of {state.threads} the last digits will differ."
        )


def _processes(count: int) -> str:
    return "1 process" if count == 1 else f"{count} processes"


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


def _check_vocab(config: ModelConfig, data: Data) -> None:
    try:
        checkpoint.check_tokenizer(config, data.tokenizer)
    except UserError as error:
        raise UserError(f'{error}; in a recipe, model.vocab_size = "auto" fits.') from None


def _difference(saved: ModelConfig, wanted: ModelConfig) -> str:
    """The first field that two configs differ in, in words."""
    before, now = saved.to_dict(), wanted.to_dict()
    field = next(key for key in before if key not in ("name", "max_context") and before[key] != now[key])
    if field == "layers":
        return (
            f"{saved.name} ({len(saved.layers)} layers), but the recipe asks for {wanted.name} ({len(wanted.layers)})"
        )
    return f"{saved.name} with {field} = {before[field]}, but the recipe asks for {wanted.name} with {now[field]}"


def _data_name(recipe: Recipe) -> str:
    section = recipe.data
    if section.reads_shards:
        return f"data.mixture ({', '.join(section.mixture)})" if section.mixture else f"data.train = {section.train!r}"
    if section.chat is not None:
        return f"data.chat.files = {list(section.chat.files)}"
    return "data.passkey" if section.passkey is not None else "data.phonebook"


def _move_aside(out: Path, observer: Observer) -> None:
    if out.exists():
        checkpoints.check_is_run(out)
        with checkpoints.run_folder(out):
            aside = out.with_name(f"{out.name}.before-{datetime.now():%Y%m%d-%H%M%S}")
            out.rename(aside)
        observer.message(f"Starting over; the earlier run is now in {aside}.")
