"""AdamW, and the choice of what decays."""

from __future__ import annotations

import torch
from torch import Tensor, nn


def decays(name: str, parameter: Tensor) -> bool:
    """Whether weight decay applies by default: not to norms, biases and D (all vectors), nor to A_log.

    A_log and D hold the state space's time scales and skip, which decay would pull towards one fixed memory length.
    """
    return parameter.ndim >= 2 and name.rpartition(".")[2] != "A_log"


def build_optimizer(
    model: nn.Module,
    *,
    lr: float,
    betas: tuple[float, float],
    eps: float,
    weight_decay: float,
    decay_all: bool = False,
) -> torch.optim.AdamW:
    """AdamW (fp32 state) over the model's trainable parameters in two groups, decayed and not.

    ``decay_all`` decays everything, as the paper's runs did.
    """
    named = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    groups = [
        {"params": [p for name, p in named if decay_all or decays(name, p)], "weight_decay": weight_decay},
        {"params": [p for name, p in named if not (decay_all or decays(name, p))], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW([g for g in groups if g["params"]], lr=lr, betas=betas, eps=eps, fused=True)


def set_learning_rate(optimizer: torch.optim.Optimizer, lr: float) -> None:
    """Set the learning rate of every group for the next step."""
    for group in optimizer.param_groups:
        group["lr"] = lr


def optimizer_tensors(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """The optimizer's state by parameter name: ``exp_avg.NAME``, ``exp_avg_sq.NAME``, ``step.NAME``."""
    return {
        f"{key}.{name}": value
        for name, p in model.named_parameters()
        for key, value in optimizer.state.get(p, {}).items()
    }


def load_optimizer_tensors(model: nn.Module, optimizer: torch.optim.Optimizer, tensors: dict[str, Tensor]) -> None:
    """Put back what :func:`optimizer_tensors` gave. Raises ValueError when a name or shape does not fit the model."""
    parameters = dict(model.named_parameters())
    optimizer.state.clear()
    for full_name, value in tensors.items():
        key, _, name = full_name.partition(".")
        if name not in parameters or (value.ndim and value.shape != parameters[name].shape):
            raise ValueError(f"{full_name} {list(value.shape)} does not fit the model")
        parameter = parameters[name]
        optimizer.state[parameter][key] = value.to(parameter.device)
