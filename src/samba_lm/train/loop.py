"""The loop: batches in, a trained model out. Single-device code that knows nothing of folders, screens or signals."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from samba_lm.data.ahead import Ahead
from samba_lm.data.columns import part_length, part_of
from samba_lm.data.loader import Batch, Batches
from samba_lm.errors import UserError
from samba_lm.loss import IGNORE_INDEX, valid_tokens
from samba_lm.model import SambaLM
from samba_lm.neighbours import Neighbours
from samba_lm.nn.cast import cast_once
from samba_lm.ops.linear.float8 import require_float8
from samba_lm.ops.linear_cross_entropy import linear_cross_entropy
from samba_lm.span import Cursor
from samba_lm.train.guard import Guard, GuardState, Limits, spike
from samba_lm.train.measure import Measure, sizes
from samba_lm.train.observer import Observer, Plan, StepRecord
from samba_lm.train.optim import build_optimizer, optimizer_tensors, set_learning_rate
from samba_lm.train.parallel import Parallel, connect
from samba_lm.train.recipe import TrainSection
from samba_lm.train.schedule import learning_rate
from samba_lm.train.stretched import stretched
from samba_lm.train.transforms import checkpoint_activations, compile_layers, remake_cheap_activations, use_float8


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


class NonFiniteError(UserError):
    """The loss, the gradient or the weights are NaN or infinite; nothing that is not finite has been saved."""


def prepare_model(model: SambaLM, settings: TrainSection, parallel: Parallel) -> SambaLM:
    """Use float8, checkpoint activations, compile, then place the model, as the settings say. In place; returns it.

    Raises UserError where the device multiplies no float8 numbers.
    """
    if settings.float8:
        require_float8(parallel.device)
        use_float8(model.layers)
    if settings.activation_checkpointing == "full":
        checkpoint_activations(model.layers)
    elif settings.activation_checkpointing == "selective":
        remake_cheap_activations(model.layers)
    if settings.compile:
        compile_layers(model.layers)
    dtype = getattr(torch, settings.dtype)
    parallel.wrap(model, dtype)
    model.compute_dtype = dtype
    return model


def make_optimizer(model: SambaLM, settings: TrainSection) -> torch.optim.Optimizer:
    """The settings' optimizer for a model that :func:`prepare_model` has placed."""
    return build_optimizer(
        model,
        lr=settings.lr,
        betas=settings.betas,
        eps=settings.eps,
        weight_decay=settings.weight_decay,
        decay_all=settings.decay_all,
        momentum=settings.momentum if settings.optimizer == "muon" else None,
    )


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
                            raise NonFiniteError(_spoiled(progress.step, what))
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


def train_step(
    model: SambaLM,
    optimizer: torch.optim.Optimizer,
    batch: Batch,
    settings: TrainSection,
    parallel: Parallel,
    *,
    step: int,
    limits: Limits | None = None,
) -> tuple[float, float]:
    """One update from one batch; returns the mean loss (nats a token) and the gradient's norm before clipping.

    The loss is the sum of token losses over the number of valid tokens in the whole batch on all processes, so neither
    accumulation, padding nor the number of processes changes it. The device is waited for once, when the update is
    queued; an update from a loss or gradient that is not finite changes nothing and raises NonFiniteError. With
    ``limits`` nothing is raised, and an update from what they do not hold changes nothing either.
    """
    batch = on_device(columns(batch, parallel), parallel.device)
    valid = parallel.sum(valid_tokens(batch.targets)).clamp(min=1)
    wide = torch.float64 if model.dtype == torch.float64 else torch.float32
    total = torch.zeros((), dtype=wide, device=parallel.device)
    optimizer.zero_grad(set_to_none=True)
    with cast_once(), stretched(model, batch.stretch):
        # The number of pieces is what is kept: of shorter rows a batch has more, and as many tokens.
        number = pieces(settings, parallel)
        for i, micro in enumerate(micro_batches(batch, -(-batch.input_ids.shape[0] // number))):
            parallel.begin_backward(model, last=i == number - 1)
            loss_sum, _ = batch_loss(model, micro, parallel.device, parallel.context)
            torch.autograd.backward(loss_sum / valid)
            total += loss_sum.detach()
    mean = parallel.sum(total) / valid
    parallel.finish_gradients(model)
    norm = parallel.norm([p.grad for p in model.parameters() if p.grad is not None])
    finite = mean.isfinite() & norm.isfinite()
    if limits is not None:
        finite &= (mean.double() <= limits.loss) & (norm.double() <= limits.grad_norm)
    _update(optimizer, finite, norm / settings.clip if settings.clip else None, parallel)
    loss, grad_norm = torch.stack((mean.double(), norm.double())).tolist()
    if limits is None and not (math.isfinite(loss) and math.isfinite(grad_norm)):
        raise NonFiniteError(_non_finite(model, step, loss, grad_norm, parallel))
    return loss, grad_norm


def pieces(settings: TrainSection, parallel: Parallel) -> int:
    """How many micro-batches each process makes of its rows of a batch.

    Raises UserError where the rows do not divide among the processes, or these into micro-batches.
    """
    rows, rest = divmod(settings.batch_size, parallel.data_world)
    if rest:
        raise UserError(
            f"train.batch_size = {settings.batch_size} rows do not divide among {parallel.data_world} processes: make "
            "it a multiple."
        )
    micro = min(settings.micro_batch_size, rows)
    if rows % micro:
        raise UserError(
            f"train.micro_batch = {micro} does not divide the {rows} rows that each of {parallel.data_world} processes "
            f"has of train.batch_size = {settings.batch_size}."
        )
    return rows // micro


def _update(optimizer: torch.optim.Optimizer, finite: Tensor, excess: Tensor | None, parallel: Parallel) -> None:
    """One step of the optimizer if ``finite`` (bool scalar), decided on the device where the optimizer can.

    ``excess``: the gradient's norm as a multiple of the allowed one; above 1 the gradient is divided by it, in the
    optimizer's own pass over memory where that is possible.
    """
    divisor = None if excess is None else torch.where(finite, excess, 1.0).clamp(min=1.0).float()
    if getattr(optimizer, "_step_supports_amp_scaling", False):  # what torch.amp.GradScaler asks: fused AdamW can
        vars(optimizer)["found_inf"] = (~finite).float()
        if divisor is not None:
            vars(optimizer)["grad_scale"] = divisor
        try:
            optimizer.step()
        finally:
            vars(optimizer).pop("found_inf")
            vars(optimizer).pop("grad_scale", None)
    elif bool(finite):
        if divisor is not None:
            gradients = [p.grad for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
            torch._foreach_div_([parallel.local(gradient) for gradient in gradients], divisor)
        optimizer.step()


@torch.no_grad()
def check_finite(model: SambaLM, optimizer: torch.optim.Optimizer, step: int, parallel: Parallel) -> None:
    """Raise NonFiniteError, naming the first bad tensor, unless all weights and optimizer state are finite."""
    bad = _first_bad(dict(model.named_parameters()) | optimizer_tensors(model, optimizer), parallel)
    if bad is not None:
        raise NonFiniteError(_spoiled(step, f"the update left {bad} not finite"))


@torch.no_grad()
def evaluate(model: SambaLM, batches: Iterable[Batch], parallel: Parallel) -> float:
    """Mean loss over all valid tokens of ``batches``, nats."""
    was_training = model.training
    model.eval()
    total = torch.zeros((), dtype=torch.float64, device=parallel.device)
    count = torch.zeros((), dtype=torch.int64, device=parallel.device)
    for batch in _evenly((columns(batch, parallel) for batch in batches), parallel):
        loss_sum, valid = batch_loss(model, batch, parallel.device, parallel.context)
        total += loss_sum
        count += valid
    parallel.settle(model)
    model.train(was_training)
    return float(parallel.sum(total) / parallel.sum(count).clamp(min=1))


def _evenly(batches: Iterable[Batch], parallel: Parallel) -> Iterator[Batch]:
    """The batches, and after them, while another process still has some, one without targets for each of its."""
    iterator = iter(batches)
    while True:
        batch = next(iterator, None)
        if not parallel.agree(batch is not None):
            return
        if batch is None:
            blank = torch.zeros(1, 2, dtype=torch.int64)
            batch = Batch(blank, torch.full_like(blank, IGNORE_INDEX), None)
        yield batch


def columns(batch: Batch, parallel: Parallel) -> Batch:
    """The part of the batch's rows that this process reads, of those that share them."""
    us = parallel.context
    return batch if us is None else part_of(batch, us.index, us.count)


def batch_loss(
    model: SambaLM, batch: Batch, device: torch.device, neighbours: Neighbours | None = None
) -> tuple[Tensor, Tensor]:
    """Sum of the batch's token losses, and how many tokens it is over: this process's, with ``neighbours``."""
    batch, start = on_device(batch, device), None
    if batch.before is not None:
        start = Cursor(*(t.to(device, non_blocking=True) for t in batch.before))
    hidden = model.hidden_states(batch.input_ids, batch.segments, start, neighbours)
    loss_sum = linear_cross_entropy(hidden, model.head_weight, batch.targets, ignore_index=IGNORE_INDEX)
    return loss_sum, valid_tokens(batch.targets)


def on_device(batch: Batch, device: torch.device) -> Batch:
    """The batch's tokens on ``device``, copied without waiting for it; its segments stay, for the model looks at them.

    What is there already is not copied again.
    """
    if device.type != "cuda" or batch.input_ids.is_cuda:
        return replace(batch, input_ids=batch.input_ids.to(device), targets=batch.targets.to(device))
    # Only from page-locked memory does a copy run while the device computes.
    segments = None if batch.segments is None else batch.segments.pin_memory()
    ids, targets = (t.pin_memory().to(device, non_blocking=True) for t in (batch.input_ids, batch.targets))
    return replace(batch, input_ids=ids, targets=targets, segments=segments)


def micro_batches(batch: Batch, size: int) -> Iterable[Batch]:
    """The batch in pieces of ``size`` rows."""
    for i in range(0, batch.input_ids.shape[0], size):
        rows = slice(i, i + size)
        segments = None if batch.segments is None else batch.segments[rows]
        before = None if batch.before is None else (batch.before[0][rows], batch.before[1][rows])
        ids, targets = batch.input_ids[rows], batch.targets[rows]
        yield replace(batch, input_ids=ids, targets=targets, segments=segments, before=before)


def _due(step: int, every: int) -> bool:
    return every > 0 and step % every == 0


def _spoiled(step: int, what: str) -> str:
    return f"Step {step}: {what}, so this step is not saved; lower train.lr or check the data."


def _first_bad(tensors: dict[str, Tensor], parallel: Parallel) -> str | None:
    """The name of the first tensor that is not finite, on whichever process; the same on all."""
    finite = torch.stack([parallel.local(tensor).isfinite().all().to("cpu") for tensor in tensors.values()])
    bad = parallel.sum((~finite).int())
    return list(tensors)[int(bad.clamp(max=1).argmax())] if bool(bad.any()) else None


def _non_finite(model: SambaLM, step: int, loss: float, grad_norm: float, parallel: Parallel) -> str:
    if not math.isfinite(loss):
        what = f"the loss is {loss}"
    else:
        bad = _first_bad({n: p.grad for n, p in model.named_parameters() if p.grad is not None}, parallel)
        what = f"the gradient's norm is {grad_norm}" + (f" (first bad: {bad})" if bad else "")
    return f"Step {step}: {what}, so training stopped before applying it; lower train.lr or check the data."
