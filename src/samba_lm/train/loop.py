"""The loop: batches in, a trained model out. Single-device code that knows nothing of folders, screens or signals."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace

import torch

from samba_lm.data.ahead import Ahead
from samba_lm.data.columns import part_length
from samba_lm.data.loader import Batch, Batches
from samba_lm.model import SambaLM
from samba_lm.train.finite import NonFiniteError, check_finite, spoiled
from samba_lm.train.guard import Guard, GuardState, spike
from samba_lm.train.measure import Measure, sizes
from samba_lm.train.observer import Observer, Plan, StepRecord
from samba_lm.train.optim import set_learning_rate
from samba_lm.train.parallel import Parallel, connect
from samba_lm.train.prepare import make_optimizer, prepare_model
from samba_lm.train.recipe import TrainSection
from samba_lm.train.schedule import learning_rate
from samba_lm.train.step import evaluate, pieces, train_step


@dataclass(frozen=True)
class Progress:
    """Where a run stands."""

    step: int = 0
    """Optimizer steps done."""
    tokens: int = 0
    seconds: float = 0.0
    """Time spent in steps, validation and checkpoints not counted."""
    loss: float = math.nan
    """Loss of the last step that was not refused."""
    val_loss: float | None = None
    best_val_loss: float | None = None
    guard: GuardState = field(default_factory=GuardState)


def fit(
    model: SambaLM,
    loader: Batches,
    settings: TrainSection,
    *,
    val: Mapping[str, Iterable[Batch]] | None = None,
    optimizer: torch.optim.Optimizer | None = None,
    parallel: Parallel | None = None,
    start: Progress | None = None,
    observer: Observer | None = None,
    save: Callable[[Progress], None] | None = None,
    stop: Callable[[], bool] = lambda: False,
    back: Callable[[], Progress | None] = lambda: None,
) -> Progress:
    """Train ``model`` in place for the settings' steps and return where the run then stands.

    Without ``optimizer`` the model is prepared and given a new one; with it, both are used as they are and ``start``
    says how far they came. ``val``: the batches of a validation, iterated anew each time, by the names of its sets, the
    first of which counts. ``save`` is called for each checkpoint due. ``stop`` is asked after every step; when it says
    so the loop saves and returns early. ``back``, where the guard may ask for it, puts model and optimizer back to the
    last checkpoint and says where that stood, None if there is none; then the step is left out instead.

    Nothing but the model, the optimizer and ``start`` decides what follows: step n always reads batch n, and where the
    guard passed over batches, as many further. Raises NonFiniteError before an update from a loss or gradient that is
    not finite, unless the guard refuses it, and before a save of weights or optimizer state that are not.
    """
    parallel = parallel or connect(settings.device)
    pieces(settings, parallel)
    if parallel.context is not None:
        model.require_parts(part_length(loader.length, parallel.context.count))
    progress = start or Progress()
    observer = observer if observer is not None and parallel.is_main else Observer()
    if optimizer is None:
        prepare_model(model, settings, parallel)
        optimizer = make_optimizer(model, settings)
    steps = settings.total_steps
    measure = Measure(model, parallel, length=loader.length, every=settings.log_every, last=steps)
    guard = Guard(settings) if settings.spike is not None else None
    model.train()
    observer.started(
        Plan(
            name=model.config.name,
            parameters=model.config.parameters(),
            device=str(parallel.device),
            first_step=progress.step,
            steps=steps,
            tokens_per_step=loader.batch_size * loader.length,
            world=parallel.world,
            mesh=sizes(parallel.mesh),
            length=loader.length,
        )
    )
    try:
        with Ahead(loader, parallel.data_rank, parallel.data_world, steps) as batches:
            while progress.step < steps:
                began = time.perf_counter()
                lr = learning_rate(
                    progress.step,
                    steps=steps,
                    peak=settings.lr,
                    warmup_fraction=settings.warmup_fraction,
                    min_ratio=settings.min_lr_ratio,
                    schedule=settings.schedule,
                    decay_fraction=settings.decay_fraction,
                    decay=settings.decay_shape,
                )
                set_learning_rate(optimizer, lr)
                asked = time.perf_counter()
                batch = batches.batch(progress.step + progress.guard.passed)
                waited = time.perf_counter() - asked
                step = progress.step + 1
                limits = guard.limits(progress.guard) if guard is not None else None
                loss, grad_norm = train_step(model, optimizer, batch, settings, parallel, step=step, limits=limits)
                elapsed = time.perf_counter() - began
                progress = replace(progress, seconds=progress.seconds + elapsed)

                refused = limits is not None and not limits.hold(loss, grad_norm)
                if guard is not None and limits is not None and refused:
                    what = spike(step, loss, grad_norm, limits)
                    there = back() if guard.goes_back else None
                    if there is not None:
                        passed = step - there.step
                        after = guard.go_back(progress.guard, there.guard, passed)
                        what += f": back to step {there.step}, passing over {passed} batches."
                        observer.returned(there.step)
                        observer.message(what + guard.warning(after))
                        progress = replace(there, seconds=progress.seconds, guard=after)
                        continue
                    progress = replace(progress, guard=guard.skip(progress.guard))
                    observer.message(f"{what}: its update is left out.{guard.warning(progress.guard)}")
                elif guard is not None:
                    progress = replace(progress, guard=guard.accept(progress.guard, loss, grad_norm))

                tokens = loader.batch_size * loader.length
                progress = replace(
                    progress,
                    step=step,
                    tokens=progress.tokens + tokens,
                    loss=progress.loss if refused else loss,
                )
                last = progress.step == steps
                val_loss, val_losses = None, {}
                if val and (last or _due(progress.step, settings.eval_every)):
                    val_losses = {name: evaluate(model, batches, parallel) for name, batches in val.items()}
                    val_loss = next(iter(val_losses.values()))
                    for name, each in val_losses.items():
                        if not math.isfinite(each):
                            what = f"the validation loss{f' on {name}' if name else ''} is {each}"
                            raise NonFiniteError(spoiled(progress.step, what))
                    best = val_loss if progress.best_val_loss is None else min(val_loss, progress.best_val_loss)
                    progress = replace(progress, val_loss=val_loss, best_val_loss=best)
                rate, each = tokens / elapsed, tokens / elapsed / parallel.world
                taken, reserved = measure.memory(step)
                observer.step(
                    StepRecord(
                        step=progress.step,
                        tokens=progress.tokens,
                        loss=loss,
                        lr=lr,
                        grad_norm=grad_norm,
                        tokens_per_s=rate,
                        mfu=measure.mfu(each),
                        val_loss=val_loss,
                        val_losses={name: each for name, each in val_losses.items() if name},
                        tokens_per_s_per_gpu=each,
                        data_wait_s=waited,
                        length=batch.input_ids.shape[1],
                        memory_peak=taken,
                        memory_reserved=reserved,
                        grad_norms=measure.grad_norms(progress.step, grad_norm),
                        refused=refused,
                        skipped=None if guard is None else progress.guard.skipped,
                        rollbacks=None if guard is None else progress.guard.rollbacks,
                    )
                )
                stopping = parallel.agree(stop())
                if last or stopping or _due(progress.step, settings.save_every):
                    check_finite(model, optimizer, progress.step, parallel)
                    if guard is not None:
                        progress = replace(progress, guard=guard.saved(progress.guard))
                    if save is not None:
                        save(progress)
                if stopping:
                    break
    finally:
        model.eval()
        observer.stopped()
    return progress


def _due(step: int, every: int) -> bool:
    return every > 0 and step % every == 0
