"""Mamba and attention beside each other on one input, where Samba has them in series: their mean, plain or gated.

The paper leaves an input-dependent combination of the two to future work; the plain mean is what it is compared with.
Each path's values are normalised before its own last projection, because the two differ in size (Hymba, Dong et al.
2024, found the same and normalises too). So both begin equally loud, the depth's rule still sets how loud a layer is,
and a gate weighs what the paths say, not how large their numbers are. The norms' weights are the learned scales.
"""

from __future__ import annotations

import torch
from torch import nn

from samba_lm.config import GatedParallel, ModelConfig, Parallel, TwoPaths
from samba_lm.mixers.attention import AttentionMixer
from samba_lm.mixers.base import Mixer, Tensors
from samba_lm.mixers.mamba import MambaMixer
from samba_lm.mixers.registry import register_mixer
from samba_lm.nn.init import Init
from samba_lm.nn.linear import Linear
from samba_lm.nn.norm import RMSNorm
from samba_lm.span import Span


class TwoPathsMixer(Mixer):
    """m = W_m norm(Mamba's values of x) and a = W_a norm(attention's), [B, L, D]; a subclass combines them.

    State: that of each path, its names after ``mamba.`` and ``attention.``
    """

    reads_parts = True

    def __init__(self, spec: TwoPaths, config: ModelConfig) -> None:
        super().__init__()
        self.mamba = MambaMixer(spec.mamba, config)
        self.attention = AttentionMixer(spec.attention, config)
        self.mamba_norm = RMSNorm(spec.mamba.inner(config.d_model), config.norm_eps)
        self.attention_norm = RMSNorm(config.d_model, config.norm_eps)

    def combine(self, x: torch.Tensor, m: torch.Tensor, a: torch.Tensor) -> torch.Tensor:
        """The layer's output of its input x and the paths' m and a, all [B, L, D]."""
        raise NotImplementedError

    def mix(self, x: torch.Tensor, tensors: Tensors, span: Span) -> tuple[torch.Tensor, Tensors]:
        m, mamba = self.mamba.values(x, _under("mamba.", tensors), span)
        a, attention = self.attention.values(x, _under("attention.", tensors), span)
        m = self.mamba.out_proj(self.mamba_norm(m))
        a = self.attention.out_proj(self.attention_norm(a))
        return self.combine(x, m, a), _joined(mamba, attention)

    def init_tensors(self, batch: int, device: torch.device, dtype: torch.dtype) -> Tensors:
        return _joined(*(path.init_tensors(batch, device, dtype) for path in (self.mamba, self.attention)))

    def reset_parameters(self, init: Init) -> None:
        self.mamba.reset_parameters(init)
        self.attention.reset_parameters(init)
        nn.init.ones_(self.mamba_norm.weight)
        nn.init.ones_(self.attention_norm.weight)


@register_mixer(Parallel)
class ParallelMixer(TwoPathsMixer):
    """(m + a) / 2."""

    def combine(self, x: torch.Tensor, m: torch.Tensor, a: torch.Tensor) -> torch.Tensor:
        return torch.lerp(a, m, 0.5)


@register_mixer(GatedParallel)
class GatedParallelMixer(TwoPathsMixer):
    """g * m + (1 - g) * a with g = sigmoid(W_2 W_1 x + b) for each channel; at first g = 1/2, whatever the input."""

    def __init__(self, spec: GatedParallel, config: ModelConfig) -> None:
        super().__init__(spec, config)
        self.gate_down = Linear(config.d_model, spec.rank(config.d_model))
        self.gate_up = Linear(spec.rank(config.d_model), config.d_model, bias=True)

    def gate(self, x: torch.Tensor) -> torch.Tensor:
        """g [B, L, D] of a normalised input x [B, L, D]: Mamba's share of each channel."""
        return torch.sigmoid(self.gate_up(self.gate_down(x)))

    def combine(self, x: torch.Tensor, m: torch.Tensor, a: torch.Tensor) -> torch.Tensor:
        return torch.lerp(a, m, self.gate(x))

    def reset_parameters(self, init: Init) -> None:
        super().reset_parameters(init)
        init.linear(self.gate_down.weight)
        nn.init.zeros_(self.gate_up.weight)
        assert self.gate_up.bias is not None
        nn.init.zeros_(self.gate_up.bias)


def _under(path: str, tensors: Tensors) -> Tensors:
    return {name.removeprefix(path): t for name, t in tensors.items() if name.startswith(path)}


def _joined(mamba: Tensors, attention: Tensors) -> Tensors:
    return {
        **{f"mamba.{name}": t for name, t in mamba.items()},
        **{f"attention.{name}": t for name, t in attention.items()},
    }
