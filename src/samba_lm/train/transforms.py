"""What is done to a model from outside, layer by layer: first float8 products, then what backward makes again, then
compilation."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from samba_lm.mixers.base import Tensors
from samba_lm.mixers.mamba import S6
from samba_lm.mixers.mlp import SwiGLUMLP
from samba_lm.nn.cast import made_once
from samba_lm.nn.linear import Linear
from samba_lm.ops.linear.float8 import LEAST, float8_linear, float8_linear_halves, float8_weight, pays
from samba_lm.ops.swiglu.float8 import float8_swiglu_mlp
from samba_lm.span import Span

COMPILED = 128
"""Programs that the layers may be compiled to: kinds of layers x shapes of rows x with and without gradients."""


def use_float8(layers: Iterable[nn.Module], least: float = LEAST) -> int:
    """Compute the large linear maps of the layers, and whole SwiGLU MLPs, by float8 products; returns how many maps.

    Which ones: those without a bias for which ``ops.linear.float8.pays(n_in, n_out, least)``. In place; parameters
    and their names stay. Without gradients (validation, generation) the layers compute as before.
    """
    count = 0
    for layer in layers:
        modules = list(layer.modules())
        maps = [module for module in modules if isinstance(module, Linear) and _fits(module, least)]
        for module in maps:
            vars(module)["forward"] = _float8(module.forward, functools.partial(_linear, module))
            vars(module)["halves"] = _float8(module.halves, functools.partial(_halves, module))
        for mlp in modules:
            if isinstance(mlp, SwiGLUMLP) and mlp.w12 in maps and mlp.w3 in maps:
                vars(mlp)["mix"] = _float8(mlp.mix, functools.partial(_mlp, mlp))
        count += len(maps)
    return count


def checkpoint_activations(layers: Iterable[nn.Module]) -> None:
    """Keep only the residual stream before each layer for backward and compute the rest again there. In place;
    parameter names stay."""
    for layer in layers:
        layer.forward = _recomputed(layer.forward)


def remake_cheap_activations(layers: Iterable[nn.Module]) -> None:
    """Keep all for backward but what is cheap to make again: the steps of Mamba's scans. In place.

    Compiled layers and the scan's PyTorch backends keep what they always do.
    """
    for layer in layers:
        for module in layer.modules():
            if isinstance(module, S6):
                module.remake_step = True


def compile_layers(layers: Iterable[nn.Module]) -> None:
    """Compile each layer by itself: equal layers share the work, and no graph spans the stack. In place.

    Each shape of rows is compiled for itself: of rows of several lengths torch would make one program for all, which it
    cannot (2.13). There are few shapes, but all layers count as one function to it, so it is allowed more than 8.
    """
    config = torch._dynamo.config
    config.recompile_limit = max(config.recompile_limit, COMPILED)
    for layer in layers:
        layer.compile(dynamic=False)


def _recomputed(forward: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(forward)
    def call(x: torch.Tensor, branch: torch.Tensor | None, *args: Any) -> Any:
        if not torch.is_grad_enabled():
            return forward(x, branch, *args)
        # Added here, not with the norm: one stream is kept where two tensors would be, a third less in bf16.
        x = x if branch is None else x + branch
        return checkpoint(forward, x, None, *args, use_reentrant=False)

    return call


def _fits(module: Linear, least: float) -> bool:
    n_out, n_in = module.weight.shape
    return module.bias is None and pays(n_in, n_out, least)


def _float8(plain: Callable[..., Any], float8: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(plain)
    def call(*args: Any) -> Any:
        return (float8 if torch.is_grad_enabled() else plain)(*args)

    return call


def _linear(module: Linear, x: torch.Tensor) -> torch.Tensor:
    return float8_linear(x, module.weight, made_once(module.weight, float8_weight))


def _halves(module: Linear, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    return float8_linear_halves(x, module.weight, made_once(module.weight, float8_weight))


def _mlp(module: SwiGLUMLP, x: torch.Tensor, tensors: Tensors, span: Span) -> tuple[torch.Tensor, Tensors]:
    w12, w3 = module.w12.weight, module.w3.weight
    casts = made_once(w12, float8_weight), made_once(w3, float8_weight)
    return float8_swiglu_mlp(x, w12, w3, casts), {}
