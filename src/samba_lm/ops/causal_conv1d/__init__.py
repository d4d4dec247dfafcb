"""Depthwise causal convolution over time, with state in and out and document boundaries."""

from __future__ import annotations

import torch

from samba_lm.ops.backend import Backend, choose
from samba_lm.ops.causal_conv1d.cpu import conv_cpu, step_cpu
from samba_lm.ops.causal_conv1d.reference import conv_reference
from samba_lm.ops.shapes import require, require_rank, require_type

BACKENDS = ("reference", "cpu", "triton")
STEP_BACKENDS = ("cpu", "triton")


def causal_conv1d(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None = None,
    *,
    state: torch.Tensor | None = None,
    positions: torch.Tensor | None = None,
    lengths: torch.Tensor | None = None,
    backend: Backend = "auto",
) -> tuple[torch.Tensor, torch.Tensor]:
    """y_t = SiLU(bias + sum_j weight[:, k-1-j] x_{t-j}), j = 0..k-1.

    Args:
        x: [B, L, E], any strides. weight: [E, k]. bias: [E] or None.
        state: [B, k-1, E] the inputs before x, oldest first; None: zeros.
        positions: int64 [B or 1, L] position of each token in its document; taps that would reach before position 0
            count as zero. None: one document, taps reach into the state.
        lengths: int64 [B] number of tokens that are not padding at the right; None: all.
        backend: see ``samba_lm.ops.backend``.

    Returns:
        y [B, L, E] in x's dtype, and the state after the last valid token [B, k-1, E] in x's dtype. Differentiable in
        x, weight, bias and state. Computed in fp32 at least.

    Raises:
        UserError: shapes, devices or dtypes that do not fit together, or a backend that cannot run here.
    """
    require_rank("causal_conv1d", "x", x, "B, L, E")
    require_rank("causal_conv1d", "weight", weight, "E, k")
    (batch, length, E), k = x.shape, weight.shape[1]
    rows = 1 if positions is not None and positions.shape[:1] == (1,) else batch
    require(
        "causal_conv1d",
        x.device,
        weight=(weight, (E, k)),
        bias=(bias, (E,)),
        state=(state, (batch, k - 1, E)),
        positions=(positions, (rows, length)),
        lengths=(lengths, (batch,)),
    )
    require_type("causal_conv1d", "positions", positions, torch.int64)
    require_type("causal_conv1d", "lengths", lengths, torch.int64)
    chosen = choose(backend, BACKENDS, "causal_conv1d", x, batch)
    if chosen == "triton":
        from samba_lm.ops.causal_conv1d.triton import conv_triton

        return conv_triton(x, weight, bias, None if state is None else state.to(x.dtype), positions, lengths)
    if state is None:
        state = x.new_zeros(batch, k - 1, E)
    run = {"reference": conv_reference, "cpu": conv_cpu}[chosen]
    return run(x, weight, bias, state.to(x.dtype), positions, lengths)


def causal_conv1d_step(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor,
    state: torch.Tensor,
    *,
    in_place: bool = False,
    backend: Backend = "auto",
) -> tuple[torch.Tensor, torch.Tensor]:
    """One token of :func:`causal_conv1d` with bias and SiLU, for decoding: x [B, E], state [B, k-1, E] in x's dtype.

    Returns y [B, E] and the new state; the given one stays as it was, or is the new one with ``in_place`` (contiguous
    and in x's dtype then). No gradients on the triton backend.
    """
    require_rank("causal_conv1d_step", "x", x, "B, E")
    require_rank("causal_conv1d_step", "weight", weight, "E, k")
    (batch, E), k = x.shape, weight.shape[1]
    require(
        "causal_conv1d_step", x.device, weight=(weight, (E, k)), bias=(bias, (E,)), state=(state, (batch, k - 1, E))
    )
    if choose(backend, STEP_BACKENDS, "causal_conv1d_step", x) == "triton":
        from samba_lm.ops.causal_conv1d.triton_step import launch, step_triton

        if in_place:
            return launch(x, weight, bias, state, state), state
        return step_triton(x, weight, bias, state)
    y, new_state = step_cpu(x, weight, bias, state)
    return y, state.copy_(new_state) if in_place else new_state
