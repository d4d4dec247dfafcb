"""AdamW, and the choice of what decays."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor


def decays(name: str, parameter: Tensor) -> bool:
    """Whether weight decay applies by default: not to norms, biases and D (all vectors), nor to A_log.

    A_log and D hold the state space's time scales and skip, which decay would pull towards one fixed memory length.
    """
    return parameter.ndim >= 2 and name.rpartition(".")[2] != "A_log"


def adamw(
    named: Sequence[tuple[str, Tensor]],
    *,
    lr: float,
    betas: tuple[float, float],
    eps: float,
    weight_decay: float,
    decay_all: bool = False,
) -> torch.optim.AdamW:
    """AdamW (fp32 state) over named parameters in two groups, decayed and not; ``decay_all``: all decayed."""
    groups = [
        # Sharded parameters by themselves: a fused update takes one kind.
        {"params": [p for p in some if isinstance(p, DTensor) == sharded], "weight_decay": decay}
        for some, decay in (
            ([p for name, p in named if decay_all or decays(name, p)], weight_decay),
            ([p for name, p in named if not (decay_all or decays(name, p))], 0.0),
        )
        for sharded in (True, False)
    ]
    return torch.optim.AdamW([g for g in groups if g["params"]], lr=lr, betas=betas, eps=eps, fused=True)


def first_state(parameter: Tensor) -> dict[str, Tensor]:
    """What AdamW keeps of a parameter, before its first step."""
    return {
        "step": torch.zeros((), dtype=torch.float32, device=parameter.device),
        "exp_avg": torch.zeros_like(parameter, requires_grad=False),
        "exp_avg_sq": torch.zeros_like(parameter, requires_grad=False),
    }
