"""The sum of a row's steps, which is all that the decay of a state over the whole row depends on."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F

CHUNK_ELEMENTS = 1 << 24
"""Steps that are held in fp32 at once."""


@torch.library.custom_op("samba_lm::total_step", mutates_args=())
def total_step(delta: torch.Tensor, bias: torch.Tensor | None, dtype: torch.dtype) -> torch.Tensor:
    """sum_t softplus(delta_t + bias), [B, E] in ``dtype``, of delta [B, L, E] and bias [E]. Keeps only these two."""
    total = delta.new_zeros(delta.shape[0], delta.shape[2], dtype=dtype)
    for part in _chunks(delta):
        total += F.softplus(_biased(part, bias, dtype)).sum(1)
    return total


@total_step.register_fake
def _(delta: torch.Tensor, bias: torch.Tensor | None, dtype: torch.dtype) -> torch.Tensor:
    return delta.new_empty(delta.shape[0], delta.shape[2], dtype=dtype)


@torch.library.custom_op("samba_lm::total_step_backward", mutates_args=())
def _backward(
    dtotal: torch.Tensor, delta: torch.Tensor, bias: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor]:
    ddelta = torch.empty_like(delta)
    dbias = dtotal.new_zeros(delta.shape[2])
    for part, out in zip(_chunks(delta), _chunks(ddelta), strict=True):
        grad = torch.sigmoid(_biased(part, bias, dtotal.dtype)).mul_(dtotal[:, None])
        out.copy_(grad)
        dbias += grad.sum((0, 1))
    return ddelta, dbias


@_backward.register_fake
def _(dtotal: torch.Tensor, delta: torch.Tensor, bias: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.empty_like(delta), dtotal.new_empty(delta.shape[2])


def _setup_context(
    ctx: Any, inputs: tuple[torch.Tensor, torch.Tensor | None, torch.dtype], output: torch.Tensor
) -> None:
    ctx.save_for_backward(*inputs[:2])


def _autograd(ctx: Any, dtotal: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None, None]:
    delta, bias = ctx.saved_tensors
    ddelta, dbias = _backward(dtotal, delta, bias)
    return ddelta, None if bias is None else dbias.to(bias.dtype), None


total_step.register_autograd(_autograd, setup_context=_setup_context)


def _chunks(x: torch.Tensor) -> tuple[torch.Tensor, ...]:
    return x.split(max(1, CHUNK_ELEMENTS // max(1, x.shape[0] * x.shape[2])), dim=1)


def _biased(delta: torch.Tensor, bias: torch.Tensor | None, dtype: torch.dtype) -> torch.Tensor:
    return delta.to(dtype) if bias is None else delta.to(dtype) + bias.to(dtype)
