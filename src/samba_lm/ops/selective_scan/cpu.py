"""The selective scan in blocks of tokens: vectorised PyTorch, forward and backward, no compiler.

Inside a block everything that does not depend on the order of time is one big operation (the exponentials, the inputs,
the reduction over states as a batched product); only ``h = decay * h + input`` walks token by token, in place, while
the block sits in cache. The backward keeps the state at each block's start, recomputes the block and mirrors it.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch.autograd.function import once_differentiable

from samba_lm.ops.backend import differentiable

# Elements of one [T, B, N, E] buffer: 2 MB in fp32, so that the three or four in use stay in the last-level cache.
BLOCK_ELEMENTS = 1 << 19
# On other devices there is no such cache, and few blocks mean few kernels.
BLOCK_ELEMENTS_ELSEWHERE = 1 << 24


def scan_cpu(
    u: torch.Tensor,
    delta: torch.Tensor,
    A: torch.Tensor,
    B: torch.Tensor,
    C: torch.Tensor,
    D: torch.Tensor | None,
    z: torch.Tensor | None,
    delta_bias: torch.Tensor | None,
    state: torch.Tensor,
    resets: torch.Tensor | None,
    padding: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Same arguments, results and meaning as ``scan_reference``.

    Without gradients, softplus, skip and gate are done block by block too, while the block is in cache.
    """
    tensors = (u, delta, A, B, C, D, z, delta_bias, state)
    if not differentiable(*tensors):
        return _without_grad(u, delta, A, B, C, D, z, delta_bias, state, resets, padding)
    u, delta, B, C = (t.to(state.dtype) for t in (u, delta, B, C))
    step = _step(delta, delta_bias, padding)
    y, final = _Scan.apply(u, step, A, B, C, state, resets)  # type: ignore[no-untyped-call]
    if D is not None:
        y = torch.addcmul(y, u, D)
    if z is not None:
        y = y * F.silu(z.to(y.dtype))
    return y, final


def _step(delta: torch.Tensor, bias: torch.Tensor | None, padding: torch.Tensor | None) -> torch.Tensor:
    step = F.softplus(delta if bias is None else delta + bias)
    return step if padding is None else step.masked_fill(padding[..., None], 0.0)


def _without_grad(
    u: torch.Tensor,
    delta: torch.Tensor,
    A: torch.Tensor,
    B: torch.Tensor,
    C: torch.Tensor,
    D: torch.Tensor | None,
    z: torch.Tensor | None,
    delta_bias: torch.Tensor | None,
    state: torch.Tensor,
    resets: torch.Tensor | None,
    padding: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    dtype, (batch, length, E), N = state.dtype, u.shape, A.shape[1]
    A2 = _log2_decay(A)
    h = state.transpose(1, 2).contiguous()
    y = torch.empty(length, batch, E, dtype=dtype, device=u.device)
    blocks = _blocks(u, N)
    # One pair of buffers for all blocks: fresh ones would come from the system each time, page by page.
    buffers = y.new_empty(2, blocks[0][1], batch, N, E)
    for start, stop in blocks:
        part = slice(start, stop)
        u_part, C_part = u[:, part].to(dtype), C[:, part].to(dtype)
        step = _step(delta[:, part].to(dtype), delta_bias, None if padding is None else padding[:, part])
        resets_part = None if resets is None else resets[:, part]
        block = _Block(u_part, step, A2, B[:, part].to(dtype), resets_part, h, buffers[:, : stop - start])
        out = y[part]
        torch.bmm(C_part.transpose(0, 1).reshape(-1, 1, N), block.states.view(-1, N, E), out=out.view(-1, 1, E))
        if D is not None:
            out.addcmul_(block.u, D)
        if z is not None:
            out.mul_(F.silu(z[:, part].to(dtype)).transpose(0, 1))
        h = block.last.clone()
    return y.transpose(0, 1), h.transpose(1, 2).contiguous()


def _log2_decay(A: torch.Tensor) -> torch.Tensor:
    """[N, E], scaled so that exp2 can serve: it is the faster exponential."""
    return (A * math.log2(math.e)).t().contiguous()


class _Block:
    """The decays and states of one block of tokens, time first: [T, B, N, E]; u, step [B, T, E], B [B, T, N].

    ``buffers``: [2, T, B, N, E] to keep them in; None: new ones.
    """

    def __init__(
        self,
        u: torch.Tensor,
        step: torch.Tensor,
        A2: torch.Tensor,
        B: torch.Tensor,
        resets: torch.Tensor | None,
        h: torch.Tensor,
        buffers: torch.Tensor | None = None,
    ) -> None:
        self.u, self.step, self.B = u.transpose(0, 1), step.transpose(0, 1), B.transpose(0, 1)
        self.du = self.step * self.u
        # out= keeps the buffers time-first and contiguous; without it they would take the inputs' strides.
        if buffers is None:
            buffers = step.new_empty(2, *self.step.shape[:2], *A2.shape)
        self.decay = torch.mul(self.step[:, :, None, :], A2, out=buffers[0]).exp2_()
        if resets is not None:
            self.decay.masked_fill_(resets.transpose(0, 1)[:, :, None, None], 0.0)
        # The inputs, turned into states in place by the loop.
        self.states = torch.mul(self.du[:, :, None, :], self.B[..., None], out=buffers[1])
        for decay_t, state_t in zip(self.decay.unbind(0), self.states.unbind(0), strict=True):
            h = state_t.addcmul_(decay_t, h)
        self.last = h


def _blocks(u: torch.Tensor, N: int) -> list[tuple[int, int]]:
    batch, length, E = u.shape
    elements = BLOCK_ELEMENTS if u.device.type == "cpu" else BLOCK_ELEMENTS_ELSEWHERE
    size = max(4, min(64, elements // max(1, batch * E * N)))
    return [(s, min(s + size, length)) for s in range(0, length, size)]


class _Scan(torch.autograd.Function):
    """The recurrence and its mirror; step is Delta after softplus, everything in one dtype."""

    @staticmethod
    def forward(
        ctx: Any,
        u: torch.Tensor,
        step: torch.Tensor,
        A: torch.Tensor,
        B: torch.Tensor,
        C: torch.Tensor,
        state: torch.Tensor,
        resets: torch.Tensor | None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        (batch, length, E), N = u.shape, A.shape[1]
        A2 = _log2_decay(A)
        h = state.transpose(1, 2).contiguous()  # [B, N, E]
        y = u.new_empty(length, batch, E)
        blocks = _blocks(u, N)
        starts = u.new_empty(len(blocks), batch, N, E)
        for i, (start, stop) in enumerate(blocks):
            starts[i] = h
            block = _block(start, stop, u, step, A2, B, resets, h)
            C_block = C[:, start:stop].transpose(0, 1).reshape(-1, 1, N)
            torch.bmm(C_block, block.states.view(-1, N, E), out=y[start:stop].view(-1, 1, E))
            h = block.last.clone()  # a copy, so that the block's buffer is free
        ctx.save_for_backward(u, step, A, B, C, resets, starts)
        return y.transpose(0, 1), h.transpose(1, 2).contiguous()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: torch.Tensor, dfinal: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        u, step, A, B, C, resets, starts = ctx.saved_tensors
        (batch, length, E), N = u.shape, A.shape[1]
        A_t, A2 = A.t().contiguous(), _log2_decay(A)
        du, dstep = u.new_empty(length, batch, E), u.new_empty(length, batch, E)
        dB, dC = u.new_empty(length, batch, N), u.new_empty(length, batch, N)
        dA = torch.zeros_like(A_t)
        carry = dfinal.transpose(1, 2)  # d loss / d state after the block, [B, N, E]
        for i, (start, stop) in reversed(list(enumerate(_blocks(u, N)))):
            h = starts[i]
            block = _block(start, stop, u, step, A2, B, resets, h)
            dy_block = dy[:, start:stop].transpose(0, 1)  # [T, B, E]
            C_block = C[:, start:stop].transpose(0, 1)
            # G[t] = d loss / d h_t: from y_t, and from h_{t+1} through its decay.
            G = torch.mul(dy_block[:, :, None, :], C_block[..., None], out=torch.empty_like(block.states))
            G[-1] += carry
            decays, grads = block.decay.unbind(0), G.unbind(0)
            for t in range(len(grads) - 2, -1, -1):
                grads[t].addcmul_(decays[t + 1], grads[t + 1])
            carry = decays[0] * grads[0]
            flat = (stop - start) * batch
            G_flat = G.view(flat, N, E)
            states = block.states.view(flat, N, E)
            torch.bmm(states, dy_block.reshape(flat, E, 1), out=dC[start:stop].view(flat, N, 1))
            torch.bmm(G_flat, block.du.reshape(flat, E, 1), out=dB[start:stop].view(flat, N, 1))
            dinput = torch.bmm(block.B.reshape(flat, 1, N), G_flat).view(-1, batch, E)
            torch.mul(dinput, block.step, out=du[start:stop])
            # X[t] = d loss / d (Delta_t A), through the decay: G_t * h_{t-1} * decay_t (zero at a reset).
            X = block.decay
            X[1:] *= block.states[:-1]
            X[0] *= h
            X *= G
            torch.mul(dinput, block.u, out=dstep[start:stop])
            torch.mul(X, A_t, out=G)
            dstep[start:stop] += G.sum(2)
            X *= block.step[:, :, None, :]
            dA += X.sum((0, 1))
        du, dstep, dB, dC = (t.transpose(0, 1) for t in (du, dstep, dB, dC))
        return du, dstep, dA.t(), dB, dC, carry.transpose(1, 2), None


def _block(
    start: int,
    stop: int,
    u: torch.Tensor,
    step: torch.Tensor,
    A2: torch.Tensor,
    B: torch.Tensor,
    resets: torch.Tensor | None,
    h: torch.Tensor,
) -> _Block:
    part = slice(start, stop)
    return _Block(u[:, part], step[:, part], A2, B[:, part], None if resets is None else resets[:, part], h)
