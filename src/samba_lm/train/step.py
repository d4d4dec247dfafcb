"""One step: a batch in, an update out; and one validation. The same code in one process and in many."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from dataclasses import replace
from operator import itemgetter

import torch
from torch import Tensor

from samba_lm.data.columns import part_of
from samba_lm.data.loader import Batch
from samba_lm.errors import UserError
from samba_lm.loss import IGNORE_INDEX, valid_tokens
from samba_lm.model import SambaLM
from samba_lm.neighbours import Neighbours
from samba_lm.nn.cast import cast_once
from samba_lm.ops.linear_cross_entropy import linear_cross_entropy
from samba_lm.span import Cursor
from samba_lm.train.finite import NonFiniteError, not_finite
from samba_lm.train.guard import Limits
from samba_lm.train.parallel import Parallel
from samba_lm.train.recipe import TrainSection
from samba_lm.train.stretched import stretched


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
    batch = on_device(columns(stretched(batch, model), parallel), parallel.device)
    valid = parallel.sum(valid_tokens(batch.targets)).clamp(min=1)
    wide = torch.float64 if model.dtype == torch.float64 else torch.float32
    total = torch.zeros((), dtype=wide, device=parallel.device)
    optimizer.zero_grad(set_to_none=True)
    with cast_once():
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
        raise NonFiniteError(not_finite(model, step, loss, grad_norm, parallel))
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
    hidden = model.hidden_states(batch.input_ids, batch.segments, start, neighbours, batch.stretch, batch.apart)
    loss_sum = linear_cross_entropy(hidden, model.head_weight, batch.targets, ignore_index=IGNORE_INDEX)
    return loss_sum, valid_tokens(batch.targets)


def on_device(batch: Batch, device: torch.device) -> Batch:
    """The batch's tokens on ``device``, copied without waiting for it; its segments stay, for the model looks at them.

    What is there already is not copied again.
    """
    later = device.type == "cuda" and not batch.input_ids.is_cuda
    if later:  # only from page-locked memory does a copy run while the device computes
        batch = batch.tokenwise(Tensor.pin_memory)
    moved = replace(batch, segments=None).tokenwise(lambda t: t.to(device, non_blocking=later))
    return replace(moved, segments=batch.segments)


def micro_batches(batch: Batch, size: int) -> Iterable[Batch]:
    """The batch in pieces of ``size`` rows."""
    for i in range(0, batch.input_ids.shape[0], size):
        rows = slice(i, i + size)
        before = None if batch.before is None else (batch.before[0][rows], batch.before[1][rows])
        yield replace(batch.tokenwise(itemgetter(rows)), before=before)
