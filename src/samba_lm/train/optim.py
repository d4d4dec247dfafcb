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
    """AdamW's state by parameter name: ``exp_avg.NAME``, ``exp_avg_sq.NAME``, ``step.NAME``, for all it updates.

    A parameter that has had no gradient yet is given the state that AdamW would begin with, so that a name that is
    missing from a file always means damage.
    """
    tensors: dict[str, Tensor] = {}
    for name, parameter in _optimized(model, optimizer).items():
        state = optimizer.state.get(parameter) or _first_state(parameter)
        tensors |= {f"{key}.{name}": value for key, value in state.items()}
    return tensors


def load_optimizer_tensors(model: nn.Module, optimizer: torch.optim.Optimizer, tensors: dict[str, Tensor]) -> None:
    """Put back what :func:`optimizer_tensors` gave.

    Raises ValueError, leaving ``optimizer`` as it was, when a name is missing or unknown, a shape or dtype does not fit
    the model, or a value is not finite.
    """
    parameters = _optimized(model, optimizer)
    wanted = {name: _first_state(parameter) for name, parameter in parameters.items()}
    names = {f"{key}.{name}" for name, state in wanted.items() for key in state}
    if names != tensors.keys():
        name = min(names ^ tensors.keys())
        raise ValueError(f"{name} is missing" if name in names else f"{name} does not fit the model")
    for name, state in wanted.items():
        for key, expected in state.items():
            value = tensors[f"{key}.{name}"]
            if (value.shape, value.dtype) != (expected.shape, expected.dtype):
                raise ValueError(f"{key}.{name} {list(value.shape)} {value.dtype} does not fit the model")
            if not value.isfinite().all():
                raise ValueError(f"{key}.{name} is not finite")
            state[key] = value.to(expected.device)
    optimizer.state.clear()
    for name, parameter in parameters.items():
        optimizer.state[parameter] = wanted[name]


def _optimized(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, nn.Parameter]:
    updated = {parameter for group in optimizer.param_groups for parameter in group["params"]}
    return {name: parameter for name, parameter in model.named_parameters() if parameter in updated}


def _first_state(parameter: Tensor) -> dict[str, Tensor]:
    return {
        "step": torch.zeros((), dtype=torch.float32, device=parameter.device),
        "exp_avg": torch.zeros_like(parameter, requires_grad=False),
        "exp_avg_sq": torch.zeros_like(parameter, requires_grad=False),
    }
