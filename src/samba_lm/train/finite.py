"""Numbers that are not finite: found on whichever process they are, told alike on all."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from samba_lm.errors import UserError
from samba_lm.model import SambaLM
from samba_lm.train.optim import optimizer_tensors
from samba_lm.train.parallel import Parallel


class NonFiniteError(UserError):
    """The loss, the gradient or the weights are NaN or infinite; nothing that is not finite has been saved."""


@torch.no_grad()
def check_finite(model: SambaLM, optimizer: torch.optim.Optimizer, step: int, parallel: Parallel) -> None:
    """Raise NonFiniteError, naming the first bad tensor, unless all weights and optimizer state are finite."""
    bad = _first_bad(dict(model.named_parameters()) | optimizer_tensors(model, optimizer), parallel)
    if bad is not None:
        raise NonFiniteError(spoiled(step, f"the update left {bad} not finite"))


def not_finite(model: SambaLM, step: int, loss: float, grad_norm: float, parallel: Parallel) -> str:
    """Why a step was not applied, in words."""
    if not math.isfinite(loss):
        what = f"the loss is {loss}"
    else:
        bad = _first_bad({n: p.grad for n, p in model.named_parameters() if p.grad is not None}, parallel)
        what = f"the gradient's norm is {grad_norm}" + (f" (first bad: {bad})" if bad else "")
    return f"Step {step}: {what}, so training stopped before applying it; lower train.lr or check the data."


def spoiled(step: int, what: str) -> str:
    """Why a step is not saved, in words."""
    return f"Step {step}: {what}, so this step is not saved; lower train.lr or check the data."


def _first_bad(tensors: dict[str, Tensor], parallel: Parallel) -> str | None:
    """The name of the first tensor that is not finite, on whichever process; the same on all."""
    finite = torch.stack([parallel.local(tensor).isfinite().all().to("cpu") for tensor in tensors.values()])
    bad = parallel.sum((~finite).int())
    return list(tensors)[int(bad.clamp(max=1).argmax())] if bool(bad.any()) else None
