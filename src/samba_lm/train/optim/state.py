"""What an optimizer keeps, by the names of the parameters: what checkpoints hold of it."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, distribute_tensor

from samba_lm.train.optim import adamw, muon


def optimizer_tensors(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """An optimizer's state by parameter name, for all it updates: ``exp_avg.NAME``, ``exp_avg_sq.NAME``, ``step.NAME``
    of AdamW, ``momentum_buffer.NAME`` of Muon.

    A parameter that has had no gradient yet is given the state that the optimizer would begin with, so that a name that
    is missing from a file always means damage.
    """
    tensors: dict[str, Tensor] = {}
    parameters = _optimized(model, optimizer)
    for name, first in _first_states(model, optimizer).items():
        state = optimizer.state.get(parameters[name]) or first
        tensors |= {f"{key}.{name}": value for key, value in state.items()}
    return tensors


def load_optimizer_tensors(model: nn.Module, optimizer: torch.optim.Optimizer, tensors: dict[str, Tensor]) -> None:
    """Put back what :func:`optimizer_tensors` gave; whole tensors are shared out where the parameters are.

    Raises ValueError, leaving ``optimizer`` as it was, when a name is missing or unknown, a shape or dtype does not fit
    the model, or a value is not finite.
    """
    wanted = _first_states(model, optimizer)
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
            state[key] = _placed(value, expected)
    optimizer.state.clear()
    for name, parameter in _optimized(model, optimizer).items():
        optimizer.state[parameter] = wanted[name]


def _optimized(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, nn.Parameter]:
    """The parameters that ``optimizer`` updates, by name."""
    updated = {parameter for group in optimizer.param_groups for parameter in group["params"]}
    return {name: parameter for name, parameter in model.named_parameters() if parameter in updated}


def _first_states(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, dict[str, Tensor]]:
    """The state that the optimizer begins with, by the parameters' names."""
    by_muon = {p for group in optimizer.param_groups if "momentum" in group for p in group["params"]}
    return {
        name: muon.first_state(p) if p in by_muon else adamw.first_state(p)
        for name, p in _optimized(model, optimizer).items()
    }


def _placed(value: Tensor, like: Tensor) -> Tensor:
    """``value`` on the device of ``like``, and shared out as it is."""
    if isinstance(like, DTensor) and not isinstance(value, DTensor):
        return distribute_tensor(value.to(like.device), like.device_mesh, like.placements)
    return value.to(like.device)
