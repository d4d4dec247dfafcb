"""The selective scan in blocks of tokens: vectorised PyTorch, forward and backward, no compiler.

Inside a block everything that does not depend on the order of time is one big operation (the exponentials, the inputs,
the reduction over states as a batched product); only ``h = decay * h + input`` walks token by token, in place, while
the block sits in cache. The backward keeps the state at each block's start, recomputes the block and mirrors it.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch.autograd.function import once_differentiable

# Elements of one [T, B, N, E] buffer: 2 MB in fp32, so that the three or four in use stay in the last-level cache.
BLOCK_ELEMENTS = 1 << 19


@torch.compiler.disable  # the walk over time is Python; tracing it would unroll every token
def scan_cpu(
    u: torch.Tensor,
    delta: torch.Tensor,
    A: torch.Tensor,
    B: torch.Tensor,
    C: torch.Tensor,
    state: torch.Tensor,
    resets: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Same arguments, results and meaning as ``scan_reference``."""
    if torch.is_grad_enabled() and any(t.requires_grad for t in (u, delta, A, B, C, state)):
        return _Scan.apply(u, delta, A, B, C, state, resets)  # type: ignore[no-untyped-call]
    y, final, _ = _forward(u, delta, A, B, C, state, resets, keep_starts=False)
    return y, final


class _Block:
    """The decays and states of one block of tokens, time first: [T, B, N, E]."""

    def __init__(
        self,
        start: int,
        stop: int,
        u: torch.Tensor,
        delta: torch.Tensor,
        A2: torch.Tensor,
        B: torch.Tensor,
        resets: torch.Tensor | None,
        h: torch.Tensor,
    ) -> None:
        self.delta = delta[:, start:stop].transpose(0, 1)  # [T, B, E]
        self.u = u[:, start:stop].transpose(0, 1)
        self.du = self.delta * self.u
        self.B = B[:, start:stop].transpose(0, 1)  # [T, B, N]
        # out= keeps the buffers time-first and contiguous; without it they would take the inputs' strides.
        buffers = u.new_empty(2, stop - start, u.shape[0], *A2.shape)
        self.decay = torch.mul(self.delta[:, :, None, :], A2, out=buffers[0]).exp2_()
        if resets is not None:
            self.decay.masked_fill_(resets[:, start:stop].transpose(0, 1)[:, :, None, None], 0.0)
        # The inputs, turned into states in place by the loop.
        self.states = torch.mul(self.du[:, :, None, :], self.B[..., None], out=buffers[1])
        for decay_t, state_t in zip(self.decay.unbind(0), self.states.unbind(0), strict=True):
            h = state_t.addcmul_(decay_t, h)
        self.last = h


def _blocks(u: torch.Tensor, N: int) -> list[tuple[int, int]]:
    batch, length, E = u.shape
    size = max(4, min(64, BLOCK_ELEMENTS // max(1, batch * E * N)))
    return [(s, min(s + size, length)) for s in range(0, length, size)]


def _forward(
    u: torch.Tensor,
    delta: torch.Tensor,
    A: torch.Tensor,
    B: torch.Tensor,
    C: torch.Tensor,
    state: torch.Tensor,
    resets: torch.Tensor | None,
    keep_starts: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
    batch, length, E = u.shape
    N = A.shape[1]
    A2 = (A * math.log2(math.e)).t().contiguous()  # [N, E]; exp2 is the faster exponential
    h = state.transpose(1, 2).contiguous()  # [B, N, E]
    y = u.new_empty(length, batch, E)
    blocks = _blocks(u, N)
    starts = u.new_empty(len(blocks), batch, N, E) if keep_starts else None
    for i, (start, stop) in enumerate(blocks):
        if starts is not None:
            starts[i] = h
        block = _Block(start, stop, u, delta, A2, B, resets, h)
        C_block = C[:, start:stop].transpose(0, 1).reshape(-1, 1, N)
        torch.bmm(C_block, block.states.view(-1, N, E), out=y[start:stop].view(-1, 1, E))
        h = block.last.clone()  # a copy, so that the block's buffer is free
    return y.transpose(0, 1), h.transpose(1, 2).contiguous(), starts


class _Scan(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        u: torch.Tensor,
        delta: torch.Tensor,
        A: torch.Tensor,
        B: torch.Tensor,
        C: torch.Tensor,
        state: torch.Tensor,
        resets: torch.Tensor | None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        y, final, starts = _forward(u, delta, A, B, C, state, resets, keep_starts=True)
        ctx.save_for_backward(u, delta, A, B, C, resets, starts)
        return y, final

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: torch.Tensor, dfinal: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        u, delta, A, B, C, resets, starts = ctx.saved_tensors
        batch, length, E = u.shape
        N = A.shape[1]
        A_t = A.t().contiguous()
        A2 = A_t * math.log2(math.e)
        du, ddelta = u.new_empty(length, batch, E), u.new_empty(length, batch, E)
        dB, dC = u.new_empty(length, batch, N), u.new_empty(length, batch, N)
        dA = torch.zeros_like(A_t)
        carry = dfinal.transpose(1, 2)  # d loss / d state after the block, [B, N, E]
        for i, (start, stop) in reversed(list(enumerate(_blocks(u, N)))):
            h = starts[i]
            block = _Block(start, stop, u, delta, A2, B, resets, h)
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
            torch.mul(dinput, block.delta, out=du[start:stop])
            # X[t] = d loss / d (delta_t A), through the decay: G_t * h_{t-1} * decay_t (zero at a reset).
            X = block.decay
            X[1:] *= block.states[:-1]
            X[0] *= h
            X *= G
            torch.mul(dinput, block.u, out=ddelta[start:stop])
            torch.mul(X, A_t, out=G)
            ddelta[start:stop] += G.sum(2)
            X *= block.delta[:, :, None, :]
            dA += X.sum((0, 1))
        time_first = (du, ddelta, dB, dC)
        du, ddelta, dB, dC = (t.transpose(0, 1) for t in time_first)
        return du, ddelta, dA.t(), dB, dC, carry.transpose(1, 2), None
