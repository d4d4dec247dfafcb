"""The selective scan as CUDA C++ (``kernels/*.cuh``), compiled by NVRTC: its operators, for whole rows and segments."""

from __future__ import annotations

from typing import Any

import torch

from samba_lm.ops import nvrtc
from samba_lm.ops.backend import differentiable
from samba_lm.ops.selective_scan.cuda_launch import (
    TILE,
    TYPES,
    Grads,
    backward_shape,
    backward_shared,
    forward_shape,
    forward_shared,
    plan_backward,
    plan_forward,
    plan_segments,
    segments_of,
    summed,
)


def fits(u: torch.Tensor, N: int) -> bool:
    """Whether the kernels take these inputs: otherwise Triton's do, as in fp32 on GPUs whose blocks have 99 KB."""
    if not (u.is_cuda and u.dtype in TYPES and u.numel() > 0):
        return False
    batch, _, E = u.shape
    forward = forward_shared(N, forward_shape(batch, E, N, u.element_size()), u.element_size(), True)
    backward = backward_shared(N, backward_shape(batch, E, N), u.element_size(), True)
    return max(forward, backward) <= nvrtc.shared_limit(u.device)


def scan_cuda(
    u: torch.Tensor,
    delta: torch.Tensor,
    A: torch.Tensor,
    B: torch.Tensor,
    C: torch.Tensor,
    D: torch.Tensor | None,
    z: torch.Tensor | None,
    delta_bias: torch.Tensor | None,
    state: torch.Tensor | None,
    resets: torch.Tensor | None,
    lengths: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Same arguments, results and meaning as ``scan_reference``; lengths int64 [B] instead of a padding mask.

    u, delta, B, C, z fp32, bf16 or fp16, any strides (read in fp32 where they differ in dtype); state None: zeros.
    Returns y in u's dtype and the final state in fp32. Backward gives the same bits every time.
    """
    dtype = u.dtype
    if any(t is not None and t.dtype != dtype for t in (delta, B, C, z)):
        u, delta, B, C = (t.float() for t in (u, delta, B, C))
        z = None if z is None else z.float()
    save = differentiable(u, delta, A, B, C, D, z, delta_bias, state)
    y, final, _ = _forward(u, delta, A, B, C, D, z, delta_bias, state, resets, lengths, save)
    return y.to(dtype), final


@torch.library.custom_op("samba_lm::selective_scan_cuda", mutates_args=())
def _forward(
    u: torch.Tensor,
    delta: torch.Tensor,
    A: torch.Tensor,
    B: torch.Tensor,
    C: torch.Tensor,
    D: torch.Tensor | None,
    z: torch.Tensor | None,
    delta_bias: torch.Tensor | None,
    state: torch.Tensor | None,
    resets: torch.Tensor | None,
    lengths: torch.Tensor | None,
    save: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    (batch, L, E), N = u.shape, A.shape[1]
    segments = segments_of(batch, L, E, reverse=False)
    if segments > 1:
        u, delta, B, C, z, resets = cut(segments, u, delta, B, C, z, resets)
        lengths = cut_lengths(lengths, segments, L // segments)
        state = _entered(segments, state, u, delta, A, B, None, delta_bias, resets, lengths, reverse=False)
    launch, y, final, checkpoints, _keep = plan_forward(
        u, delta, A, B, C, D, z, delta_bias, state, resets, lengths, save
    )
    nvrtc.launch(launch, u.device)
    if segments > 1:
        y, final = y.view(batch, L, E), final.unflatten(0, (batch, segments))[:, -1].clone()
        checkpoints = checkpoints.view(batch, -1, N, E) if save else checkpoints
    return y, final, checkpoints


def _entered(
    segments: int,
    first: torch.Tensor | None,
    x: torch.Tensor,
    delta: torch.Tensor,
    A: torch.Tensor,
    w: torch.Tensor,
    z: torch.Tensor | None,
    delta_bias: torch.Tensor | None,
    resets: torch.Tensor | None,
    lengths: torch.Tensor | None,
    *,
    reverse: bool,
) -> torch.Tensor:
    """What each segment is entered with, [B * segments, E, N]: ``first`` [B, E, N] (None: zeros) by the first of them,
    in reverse by the last. The other arguments: see ``plan_segments``."""
    from samba_lm.ops.selective_scan.triton import chain  # NVRTC comes with builds of PyTorch that bring Triton too

    row = needed(segments, x.shape[0], reverse=reverse)
    launch, local, steps, _keep = plan_segments(
        x, delta, A, w, z, delta_bias, resets, lengths, reverse=reverse, row=row
    )
    nvrtc.launch(launch, x.device)
    local, steps = local.unflatten(0, (-1, segments)), steps.unflatten(0, (-1, segments))
    first = torch.zeros_like(local[:, 0]) if first is None else first.contiguous()
    return chain(local, steps, A.contiguous(), first, reverse=reverse).flatten(0, 1)


@_forward.register_fake
def _(
    u: torch.Tensor,
    delta: torch.Tensor,
    A: torch.Tensor,
    B: torch.Tensor,
    C: torch.Tensor,
    D: torch.Tensor | None,
    z: torch.Tensor | None,
    delta_bias: torch.Tensor | None,
    state: torch.Tensor | None,
    resets: torch.Tensor | None,
    lengths: torch.Tensor | None,
    save: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    (batch, L, E), N = u.shape, A.shape[1]
    checkpoints = A.new_empty((batch, -(-L // TILE), N, E) if save else (0,))
    return u.new_empty(batch, L, E), A.new_empty(batch, E, N), checkpoints


def cut(segments: int, *tensors: torch.Tensor | None) -> Any:
    """Each [B, L, ...] as [B * segments, L / segments, ...], views where the batch's rows follow each other."""
    return [None if t is None else t.unflatten(1, (segments, -1)).flatten(0, 1) for t in tensors]


def needed(segments: int, rows: int, *, reverse: bool) -> slice:
    """The segments whose effect another one waits for: of a single row all but the last one taken."""
    if rows != segments:
        return slice(None)
    return slice(1, None) if reverse else slice(0, -1)


def cut_lengths(lengths: torch.Tensor | None, segments: int, span: int) -> torch.Tensor | None:
    """The number of valid tokens in each segment."""
    if lengths is None:
        return None
    starts = torch.arange(segments, device=lengths.device) * span
    return (lengths[:, None] - starts).clamp(0, span).flatten()


@torch.library.custom_op("samba_lm::selective_scan_cuda_backward", mutates_args=())
def _backward(
    dy: torch.Tensor,
    dfinal: torch.Tensor | None,
    u: torch.Tensor,
    delta: torch.Tensor,
    A: torch.Tensor,
    B: torch.Tensor,
    C: torch.Tensor,
    D: torch.Tensor | None,
    z: torch.Tensor | None,
    delta_bias: torch.Tensor | None,
    resets: torch.Tensor | None,
    lengths: torch.Tensor | None,
    checkpoints: torch.Tensor,
) -> list[torch.Tensor]:
    batch, L, E = u.shape
    segments = segments_of(batch, L, E, reverse=True)
    if segments > 1:
        dy, u, delta, B, C, z, resets, checkpoints = cut(segments, dy, u, delta, B, C, z, resets, checkpoints)
        lengths = cut_lengths(lengths, segments, L // segments)
        dfinal = _entered(segments, dfinal, dy, delta, A, C, z, delta_bias, resets, lengths, reverse=True)
    launches, grads, _keep = plan_backward(
        dy, dfinal, u, delta, A, B, C, D, z, delta_bias, resets, lengths, checkpoints
    )
    for each in launches:
        nvrtc.launch(each, u.device)
    return [*_whole(summed(grads), batch, segments)]


@_backward.register_fake
def _(
    dy: torch.Tensor,
    dfinal: torch.Tensor | None,
    u: torch.Tensor,
    delta: torch.Tensor,
    A: torch.Tensor,
    B: torch.Tensor,
    C: torch.Tensor,
    D: torch.Tensor | None,
    z: torch.Tensor | None,
    delta_bias: torch.Tensor | None,
    resets: torch.Tensor | None,
    lengths: torch.Tensor | None,
    checkpoints: torch.Tensor,
) -> list[torch.Tensor]:
    (batch, L, E), N = u.shape, A.shape[1]
    like_u, like_B = (u.new_empty(batch, L, width) for width in (E, N))
    dz = u.new_empty((batch, L, E) if z is not None else (0,))
    dD, dbias = A.new_empty(E), A.new_empty(E)
    dstate = A.new_empty(batch, E, N)
    return [like_u, like_u.clone(), A.new_empty(E, N), like_B, like_B.clone(), dD, dz, dbias, dstate]


def _whole(grads: Grads, batch: int, segments: int) -> Grads:
    """The gradients of segments as those of rows; the state's is the first segment's."""
    if segments == 1:
        return grads
    rows = {
        name: getattr(grads, name).unflatten(0, (batch, segments)).flatten(1, 2)
        for name in ("u", "delta", "B", "C", "z")
        if getattr(grads, name).numel()
    }
    return grads._replace(**rows, state=grads.state.unflatten(0, (batch, segments))[:, 0].clone())


def _setup_context(ctx: Any, inputs: tuple, output: tuple) -> None:
    ctx.save_for_backward(*inputs[:11], output[2])
    ctx.set_materialize_grads(False)


def _autograd(
    ctx: Any, dy: torch.Tensor | None, dfinal: torch.Tensor | None, _checkpoints: torch.Tensor | None
) -> tuple[torch.Tensor | None, ...]:
    u, delta, A, B, C, D, z, delta_bias, state, resets, lengths, checkpoints = ctx.saved_tensors
    if dy is None:
        dy = torch.zeros_like(u, memory_format=torch.contiguous_format)
    grads = Grads(*_backward(dy, dfinal, u, delta, A, B, C, D, z, delta_bias, resets, lengths, checkpoints))
    given = (u, delta, A, B, C, D, z, delta_bias, state)
    return *(None if t is None else g for t, g in zip(given, grads, strict=True)), None, None, None


_forward.register_autograd(_autograd, setup_context=_setup_context)
