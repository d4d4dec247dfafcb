"""Training on short rows as if they were long: tokens of which each stands for many of its kind."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from samba_lm.mixers.mamba import S6
from samba_lm.model import SambaLM


@contextmanager
def stretched(model: SambaLM, times: torch.Tensor | None) -> Iterator[None]:
    """While this lasts, Mamba's states read rows of ``times`` [B, L] (at least 1; None: all 1), forward and backward.

    See :func:`samba_lm.mixers.mamba.lasting`.
    """
    layers = [] if times is None else [module for module in model.modules() if isinstance(module, S6)]
    try:
        for layer in layers:
            layer.times = times
        yield
    finally:
        for layer in layers:
            layer.times = None
