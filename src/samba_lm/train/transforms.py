"""What is done to a model from outside, layer by layer: first what backward makes again, then compilation."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from samba_lm.mixers.mamba import S6


def checkpoint_activations(layers: Iterable[nn.Module]) -> None:
    """Keep only each layer's inputs for backward and compute the rest again there. In place; parameter names stay."""
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
    """Compile each layer by itself: equal layers share the work, and no graph spans the stack. In place."""
    for layer in layers:
        layer.compile()


def _recomputed(forward: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(forward)
    def call(*args: Any, **kwargs: Any) -> Any:
        if not torch.is_grad_enabled():
            return forward(*args, **kwargs)
        return checkpoint(forward, *args, use_reentrant=False, **kwargs)

    return call
