"""Mamba channels that begin slow: they hold what they have read for far longer than a training row."""

from __future__ import annotations

import torch

from samba_lm.mixers.mamba import Selection
from samba_lm.model import SambaLM
from samba_lm.nn.init import step_bias

STEPS = (1e-6, 1e-3)
"""Where the step Delta of such a channel begins, log-uniform; for the others that is ``samba_lm.nn.init.STEPS``."""


def slow_channels(model: SambaLM, share: float, seed: int) -> None:
    """Let the last ``share`` (0 to 1) of the channels of every Mamba layer begin with steps drawn from :data:`STEPS`.

    A channel forgets at a rate of Delta x n a token (n = 1 .. d_s): from Mamba's own range, exp(-4) and less is left of
    anything after 4,096 tokens. The gradient of a step is about as small as the step, so that training hardly makes
    slow channels from fast ones; the other way is easy. In place; the draws depend on ``seed`` and nothing else.
    """
    generator = torch.Generator().manual_seed(seed)
    for module in model.modules():
        if isinstance(module, Selection):
            size = round(share * module.dt_bias.numel())
            biases = step_bias(torch.empty(size, dtype=torch.float64), STEPS, generator)
            with torch.no_grad():
                module.dt_bias[module.dt_bias.numel() - size :] = biases.to(module.dt_bias)
