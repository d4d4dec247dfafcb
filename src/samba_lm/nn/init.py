"""Initialisation rules of the reference code, as two strategies over the kinds of weights a layer may have."""

from __future__ import annotations

import math

import torch
from torch import nn

from samba_lm.config import ModelConfig


def inverse_softplus(x: torch.Tensor) -> torch.Tensor:
    """What softplus makes ``x`` of, exact for small ``x`` too."""
    return x + torch.log(-torch.expm1(-x))


STEPS = (1e-3, 1e-1)
"""Where Mamba's steps Delta begin. (The reference's floor of 1e-4 is below all of them.)"""


def step_bias(p: torch.Tensor, steps: tuple[float, float], generator: torch.Generator) -> torch.Tensor:
    """Biases, of the shape and dtype of ``p``, from which softplus makes steps drawn log-uniform from the range
    ``steps``."""
    low, high = map(math.log, steps)
    return inverse_softplus(torch.empty_like(p).uniform_(low, high, generator=generator).exp())


class Init:
    """Rule ``samba``: tied embedding N(0, 0.02), linears at U(+-1/sqrt(fan_in)), each layer's last projection divided
    by the square root of the number of residual layers."""

    def __init__(self, config: ModelConfig, generator: torch.Generator) -> None:
        self.config, self.generator = config, generator

    def uniform(self, p: torch.Tensor, bound: float) -> None:
        nn.init.uniform_(p, -bound, bound, generator=self.generator)

    def normal(self, p: torch.Tensor, std: float) -> None:
        nn.init.normal_(p, 0.0, std, generator=self.generator)

    def embedding(self, p: torch.Tensor) -> None:
        self.normal(p, 0.02)

    def linear(self, p: torch.Tensor) -> None:
        self.uniform(p, p.shape[1] ** -0.5)

    def output(self, p: torch.Tensor) -> None:
        """The last projection of a residual layer."""
        self.linear(p)
        self._shrink(p)

    def linear_attention(self, p: torch.Tensor) -> None:
        """Projections of GLA and retention: Xavier uniform of gain 2^-2.5."""
        self.uniform(p, 2**-2.5 * math.sqrt(6 / (p.shape[0] + p.shape[1])))

    def linear_attention_output(self, p: torch.Tensor) -> None:
        self.linear_attention(p)
        self._shrink(p)

    def conv(self, weight: torch.Tensor, *biases: torch.Tensor) -> None:
        """A depthwise kernel [E, k] and its bias [E], if any: U(+-1/sqrt(k))."""
        for p in (weight, *biases):
            self.uniform(p, weight.shape[1] ** -0.5)

    def dt_bias(self, p: torch.Tensor) -> None:
        """Steps of :data:`STEPS`, log-uniform."""
        with torch.no_grad():
            p.copy_(step_bias(p, STEPS, self.generator))

    def a_log(self, p: torch.Tensor) -> None:
        """S4D-real: log(1..N) in every channel."""
        with torch.no_grad():
            p.copy_(torch.arange(1, p.shape[1] + 1, dtype=p.dtype, device=p.device).log().expand_as(p))

    def _shrink(self, p: torch.Tensor) -> None:
        with torch.no_grad():
            p.div_(math.sqrt(len(self.config.layers)))


class LlamaInit(Init):
    """Rule ``llama``: untied embeddings and every linear N(0, sqrt(2 / (5 d_model))), each layer's last projection
    N(0, 1 / (sqrt(d_model) n_mixers))."""

    def embedding(self, p: torch.Tensor) -> None:
        self.linear(p)

    def linear(self, p: torch.Tensor) -> None:
        self.normal(p, math.sqrt(2 / (5 * self.config.d_model)))

    def output(self, p: torch.Tensor) -> None:
        self.normal(p, 1 / (math.sqrt(self.config.d_model) * self.config.n_mixers))

    def linear_attention(self, p: torch.Tensor) -> None:
        self.linear(p)

    def linear_attention_output(self, p: torch.Tensor) -> None:
        self.output(p)


RULES: dict[str, type[Init]] = {"samba": Init, "llama": LlamaInit}
