"""Mamba-1 layer (S6): the paper's section 2.1."""

from __future__ import annotations

import math
from contextlib import AbstractContextManager, nullcontext
from functools import partial

import torch
from torch import nn

from samba_lm.config import Mamba, ModelConfig
from samba_lm.mixers.base import Mixer, Tensors, state_dtype
from samba_lm.mixers.registry import register_mixer
from samba_lm.nn.cast import cast
from samba_lm.nn.init import Init
from samba_lm.nn.linear import Linear
from samba_lm.nn.recompute import remade
from samba_lm.ops.causal_conv1d import causal_conv1d, causal_conv1d_step
from samba_lm.ops.linear import linear
from samba_lm.ops.selective_scan import scan_effect, selective_scan, selective_scan_step
from samba_lm.span import Span

LONGEST_STEP = 0.1
"""Largest step Delta that a token may get by standing for many, see :func:`lasting`."""


def lasting(delta: torch.Tensor, bias: torch.Tensor, times: torch.Tensor) -> torch.Tensor:
    """``delta`` [B, L, E], before ``bias`` [E] and softplus, as it is when a token lasts ``times`` [B, L] as long.

    A state that reads the same token k times decays by exp(k Delta A) and takes in nearly k Delta B u, as one step of
    k Delta does while k Delta |A| is small. That is what tells long texts from short ones: much is read, not only much
    forgotten. A channel forgets what is 1/(Delta |A|) tokens back, so one whose steps are large has the same state
    after one of its tokens as after many; hence no step is made longer than :data:`LONGEST_STEP`, and none shorter.
    """
    dtype = state_dtype(delta.dtype)
    step = delta.to(dtype) + bias.to(dtype)  # its softplus is nearly its exp where it is small
    room = math.log(math.expm1(LONGEST_STEP)) - step
    return (delta + torch.minimum(times.log()[..., None], room).clamp(min=0)).to(delta.dtype)


class DepthwiseConv(nn.Module):
    """Parameters of a causal depthwise convolution: weight [E, k], bias [E]."""

    def __init__(self, channels: int, kernel: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(channels, kernel))
        self.bias = nn.Parameter(torch.empty(channels))


class Selection(nn.Module):
    """The parameters of the recurrence that are read in fp32 whatever the compute dtype."""

    def __init__(self, inner: int, state: int) -> None:
        super().__init__()
        self.A_log = nn.Parameter(torch.empty(inner, state))
        self.D = nn.Parameter(torch.empty(inner))
        self.dt_bias = nn.Parameter(torch.empty(inner))
        self.fixed: tuple[torch.Tensor, torch.Tensor, torch.Tensor] | None = None

    def A(self, dtype: torch.dtype) -> torch.Tensor:  # noqa: N802 - the equation's name
        """-exp(A_log), [E, N]."""
        return -torch.exp2(self.A_log.to(dtype) * math.log2(math.e))  # exp2 is 4x faster than exp on CPUs

    def for_step(self, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """A, D and dt_bias in ``dtype``, without gradients."""
        if self.fixed is not None and self.fixed[0].dtype == dtype:
            return self.fixed
        return self.A(dtype), self.D.to(dtype), self.dt_bias.to(dtype)

    def fix(self, yes: bool) -> None:
        """The parameters stay as they are from now on, or no longer: what a step makes of them is made once."""
        self.fixed = None
        if yes:
            with torch.no_grad():
                self.fixed = self.for_step(state_dtype(self.D.dtype))

    def reset_parameters(self, init: Init) -> None:
        init.a_log(self.A_log)
        nn.init.ones_(self.D)
        init.dt_bias(self.dt_bias)


class S6(nn.Module):
    """Short convolution, input-dependent step, B and C, and the scan: U [B, L, E] -> Y [B, L, E].

    State: ``conv`` [B, k-1, E] the last inputs, ``ssm`` [B, E, N] in fp32.
    """

    remake_step = False
    """Make the step again in backward, a thin product, instead of keeping E numbers a token for it."""

    def __init__(self, inner: int, rank: int, state: int, conv: int) -> None:
        super().__init__()
        self.inner, self.rank, self.state = inner, rank, state
        self.conv = DepthwiseConv(inner, conv)
        self.x_proj = Linear(inner, rank + 2 * state)  # rows [W_r; W_b; W_c]
        self.dt_proj = Linear(rank, inner)  # W_q; its bias is selection.dt_bias
        self.selection = Selection(inner, state)

    def forward(
        self, h: torch.Tensor, gate: torch.Tensor | None, tensors: Tensors, span: Span
    ) -> tuple[torch.Tensor, Tensors]:
        if span.length == 1 and span.documents is None and not torch.is_grad_enabled():
            return self._step(h[:, 0], None if gate is None else gate[:, 0], tensors, span.in_place)
        u, conv = causal_conv1d(
            h,
            self.conv.weight,
            self.conv.bias,
            state=span.before(h, tensors["conv"]),
            positions=span.tap_positions,
            lengths=span.lengths,
        )
        low, B, C = self.x_proj(u).split((self.rank, self.state, self.state), dim=-1)
        delta, A, bias = self.dt_proj(low), self.selection.A(state_dtype(h.dtype)), self.selection.dt_bias
        product = delta
        if span.times is not None:
            delta = lasting(product, bias, span.times)
        with nullcontext() if delta is not product else self._keeping(low, delta):

            def effect() -> tuple[torch.Tensor, torch.Tensor]:
                return scan_effect(u, delta, A, B, bias, resets=span.resets, lengths=span.lengths)

            y, ssm = selective_scan(
                u,
                delta,
                A,
                B,
                C,
                self.selection.D,
                gate,
                bias,
                state=span.entered(tensors["ssm"], effect),
                resets=span.resets,
                lengths=span.lengths,
            )
        return y, {"conv": conv, "ssm": ssm}

    def _keeping(self, low: torch.Tensor, delta: torch.Tensor) -> AbstractContextManager[object]:
        """How the scan keeps delta = dt_proj(low) for its backward."""
        if not self.remake_step or torch.compiler.is_compiling() or not torch.is_grad_enabled():
            return nullcontext()
        weight = cast(self.dt_proj.weight, low.dtype)
        return remade(delta, partial(linear, low.detach(), weight.detach()))

    def _step(
        self, h: torch.Tensor, gate: torch.Tensor | None, tensors: Tensors, in_place: bool
    ) -> tuple[torch.Tensor, Tensors]:
        """One token, without gradients: h [B, E]."""
        conv, ssm = tensors["conv"], tensors["ssm"]
        u, conv = causal_conv1d_step(h, self.conv.weight, self.conv.bias, conv, in_place=in_place)
        low, B, C = self.x_proj(u).split((self.rank, self.state, self.state), dim=-1)
        A, skip, bias = self.selection.for_step(ssm.dtype)
        delta = self.dt_proj(low)
        y, ssm = selective_scan_step(u, delta, A, B, C, skip, gate, bias, ssm, in_place=in_place)
        return y[:, None], {"conv": conv, "ssm": ssm}

    def init_tensors(self, batch: int, device: torch.device, dtype: torch.dtype) -> Tensors:
        return {
            "conv": torch.zeros(batch, self.conv.weight.shape[1] - 1, self.inner, device=device, dtype=dtype),
            "ssm": torch.zeros(batch, self.inner, self.state, device=device, dtype=state_dtype(dtype)),
        }

    def reset_parameters(self, init: Init) -> None:
        init.linear(self.x_proj.weight)
        init.conv(self.conv.weight, self.conv.bias)
        init.uniform(self.dt_proj.weight, self.rank**-0.5)
        self.selection.reset_parameters(init)


@register_mixer(Mamba)
class MambaMixer(Mixer):
    """O = (S6(X W_in) * SiLU(X W_g)) W_out."""

    reads_parts = True

    def __init__(self, spec: Mamba, config: ModelConfig) -> None:
        super().__init__()
        inner = spec.inner(config.d_model)
        self.in_proj = Linear(config.d_model, 2 * inner)  # rows [W_in; W_g]
        self.s6 = S6(inner, spec.rank(config.d_model), spec.state, spec.conv)
        self.out_proj = Linear(inner, config.d_model)

    def mix(self, x: torch.Tensor, tensors: Tensors, span: Span) -> tuple[torch.Tensor, Tensors]:
        y, tensors = self.values(x, tensors, span)
        return self.out_proj(y), tensors

    def values(self, x: torch.Tensor, tensors: Tensors, span: Span) -> tuple[torch.Tensor, Tensors]:
        """What the last projection reads, [B, L, E], and the new state."""
        h, gate = self.in_proj.halves(x)
        return self.s6(h, gate, tensors, span)

    def init_tensors(self, batch: int, device: torch.device, dtype: torch.dtype) -> Tensors:
        return self.s6.init_tensors(batch, device, dtype)

    def reset_parameters(self, init: Init) -> None:
        init.linear(self.in_proj.weight)
        self.s6.reset_parameters(init)
        init.output(self.out_proj.weight)
