"""A run in a folder: data, model and optimizer from a recipe, checkpoints on the way, and exact continuation."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path

import torch

from samba_lm import checkpoint
from samba_lm.config import ModelConfig
from samba_lm.errors import UserError
from samba_lm.model import SambaLM
from samba_lm.train import checkpoints
from samba_lm.train.checkpoints import TrainerState
from samba_lm.train.data import Data, open_data
from samba_lm.train.interrupt import stop_on_signals
from samba_lm.train.loop import NonFiniteError, Progress, fit, make_optimizer, prepare_model
from samba_lm.train.metrics import JsonlMetrics, TensorBoardMetrics
from samba_lm.train.observer import Observer, Observers
from samba_lm.train.parallel import Parallel, connect
from samba_lm.train.recipe import Recipe
from samba_lm.train.slow_channels import slow_channels

FIXED = (
    *("train.batch_size", "train.length", "train.seed"),
    *("data.documents", "data.passkey", "data.phonebook"),
    "model.slow_channels",
)
"""Fields, or sections, that decide which tokens step n reads (a run continued with others would skip or repeat data),
or how the run began."""

FREE = (
    *("train.out", "train.tensorboard", "train.log_every", "train.save_every", "train.keep"),
    *("data.train", "data.val", "data.tokenizer"),
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
    stop: Callable[[], bool] = lambda: False,
) -> TrainResult:
    """Train as ``recipe`` says, into its ``train.out``; a run found there is continued bit for bit.

    ``model`` (its config decides, its weights are trained in place) stands in for the one that the recipe would make.
    ``fresh`` moves an earlier run aside and starts over. Ctrl-C, SIGTERM, SIGHUP and a true ``stop()`` end the run
    after the current step, with a checkpoint. Raises UserError for whatever the user can put right: settings, data, a
    checkpoint of another model, tokenizer or data, a full disk, a loss that is not finite.
    """
    settings = recipe.train
    steps = settings.total_steps
    out = Path(settings.out)
    observer = observer or Observer()
    parallel = connect(settings.device)
    data = open_data(recipe)
    if fresh:
        _move_aside(out, observer)
    with checkpoints.run_folder(out):
        latest = checkpoint.latest_step(out)
        # Before anything is made: a mixer of the user's own may draw from the default generator.
        torch.manual_seed(settings.seed)
        if latest is None:
            state = None
            model = model or _new_model(recipe, data)
            _check_vocab(model.config, data)
        else:
            state = checkpoints.read_state(latest)
            model = _saved_model(latest, state, recipe, data, model)
            if state.step >= steps:
                observer.message(f"{latest} has all {steps} steps: raise train.steps to go on.")
                return _result(_progress(state), latest, parallel)
            _tell_resume(latest, state, recipe, observer)
        prepare_model(model, settings, parallel)
        optimizer = make_optimizer(model, settings)
        progress = Progress()
        if latest is not None and state is not None:
            checkpoints.restore_optimizer(latest, model, optimizer)
            checkpoints.restore_rng(latest, state.rng.get(str(parallel.rank), {}), parallel.device)
            progress = _progress(state)

        watchers = Observers([*_metrics(out, recipe), observer])

        def save(progress: Progress) -> None:
            nonlocal latest
            watchers.saving()
            state = _state(progress, recipe, model, data, parallel)
            latest = checkpoints.save_checkpoint(out, model, data.tokenizer, optimizer, state, keep=settings.keep)
            watchers.saved(progress.step, latest)

        with stop_on_signals() as request:
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
                    stop=lambda: bool(request) or stop(),
                )
            except NonFiniteError as error:
                raise NonFiniteError(f"{error} Last good checkpoint: {latest or 'none yet'}.") from None
    assert latest is not None, "the loop saves after its last step"
    return _result(progress, latest, parallel, interrupted=request.signal if progress.step < steps else None)


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


def _saved_model(folder: Path, state: TrainerState, recipe: Recipe, data: Data, model: SambaLM | None) -> SambaLM:
    """The model to go on with, after checking that the checkpoint belongs to this recipe, model and data."""
    remedy = "set train.out to another folder, or start over with --fresh"
    saved, _ = checkpoint.load(folder, dtype=torch.float32)
    changes = recipe.differences(state.recipe)
    if model is not None or any(field.startswith("model.") for field in changes):
        wanted = model.config if model is not None else _wanted_config(recipe, data)
        if wanted.fingerprint() != saved.config.fingerprint():
            raise UserError(f"{folder} holds another model: {_difference(saved.config, wanted)}; {remedy}.")
    if state.tokenizer != data.tokenizer.fingerprint():
        raise UserError(
            f"{folder} was trained with tokenizer {state.tokenizer[:12]}, but {_data_name(recipe)} "
            f"has {data.tokenizer.fingerprint()[:12]}; {remedy}."
        )
    for field, (now, before) in changes.items():
        if field.startswith(FIXED):
            raise UserError(f"{folder} was trained with {field} = {before}, not {now}; {remedy}.")
    if state.data != data.fingerprint:
        raise UserError(
            f"{folder} was trained on data {state.data[:12]} ({state.recipe['data'].get('train')!r}), but "
            f"{_data_name(recipe)} is {data.fingerprint[:12]}; {remedy}, or fine-tune with model.init_from."
        )
    if model is None:
        return saved
    model.load_state_dict(saved.state_dict())
    return model


def _tell_resume(folder: Path, state: TrainerState, recipe: Recipe, observer: Observer) -> None:
    observer.message(f"Continuing from {folder}, step {state.step} of {recipe.train.total_steps}.")
    for field, (now, before) in recipe.differences(state.recipe).items():
        if field not in FREE:
            observer.message(f"Changed since the checkpoint: {field} = {now}, was {before}.")
    if state.threads != torch.get_num_threads():
        observer.message(
            f"With {torch.get_num_threads()} CPU threads instead of {state.threads} the last digits will differ."
        )


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
    return Progress(state.step, state.tokens, state.seconds, state.loss, state.val_loss, state.best_val_loss)


def _state(progress: Progress, recipe: Recipe, model: SambaLM, data: Data, parallel: Parallel) -> TrainerState:
    return TrainerState(
        step=progress.step,
        tokens=progress.tokens,
        seconds=progress.seconds,
        loss=progress.loss,
        val_loss=progress.val_loss,
        best_val_loss=progress.best_val_loss,
        recipe=recipe.to_dict(),
        config=model.config.fingerprint(),
        tokenizer=data.tokenizer.fingerprint(),
        data=data.fingerprint,
        threads=torch.get_num_threads(),
        rng={str(parallel.rank): checkpoints.rng_state(parallel.device)},
    )


def _metrics(out: Path, recipe: Recipe) -> list[Observer]:
    every = recipe.train.log_every
    metrics: list[Observer] = [JsonlMetrics(out / "metrics.jsonl", every)]
    if recipe.train.tensorboard:
        metrics.append(TensorBoardMetrics(out / "tensorboard", every))
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
        return f"data.train = {section.train!r}"
    return "data.passkey" if section.passkey is not None else "data.phonebook"


def _move_aside(out: Path, observer: Observer) -> None:
    if out.exists():
        checkpoints.check_is_run(out)
        with checkpoints.run_folder(out):
            aside = out.with_name(f"{out.name}.before-{datetime.now():%Y%m%d-%H%M%S}")
            out.rename(aside)
        observer.message(f"Starting over; the earlier run is now in {aside}.")
