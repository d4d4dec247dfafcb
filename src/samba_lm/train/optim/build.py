"""The optimizer of a run: AdamW, or Muon for the matrices and AdamW for the rest, behind one door."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from samba_lm.train.optim.adamw import adamw
from samba_lm.train.optim.matrices import matrices
from samba_lm.train.optim.muon import Muon


class Together(torch.optim.Optimizer):
    """Several optimizers of different parameters as one: the same groups one after another, one state."""

    _step_supports_amp_scaling = True

    def __init__(self, members: list[torch.optim.Optimizer]) -> None:
        super().__init__([group for member in members for group in member.param_groups], {})
        self.members = members
        for member in members:
            member.state = self.state

    def step(self, closure: Callable[[], Any] | None = None) -> None:  # type: ignore[override]
        """One update by each, which is told the ``found_inf`` and ``grad_scale`` that this one was."""
        assert closure is None
        told = {name: value for name, value in vars(self).items() if name in ("found_inf", "grad_scale")}
        for member in self.members:
            vars(member).update(told)
            try:
                member.step()
            finally:
                for name in told:
                    del vars(member)[name]


def build_optimizer(
    model: nn.Module,
    *,
    lr: float,
    betas: tuple[float, float],
    eps: float,
    weight_decay: float,
    decay_all: bool = False,
    momentum: float | None = None,
) -> torch.optim.Optimizer:
    """AdamW (fp32 state) over the model's trainable parameters in two groups, decayed and not.

    ``decay_all`` decays everything, as the paper's runs did. With ``momentum`` Muon has the weights of linear maps,
    and AdamW all else; both have the same learning rate.
    """
    maps = matrices(model) if momentum is not None else {}
    named = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    chosen = [(name, p) for name, p in named if name in maps]
    others = [(name, p) for name, p in named if name not in maps]
    members: list[torch.optim.Optimizer] = []
    if momentum is not None and chosen:
        group = {"params": [p for _, p in chosen], "parts": [maps[name] for name, _ in chosen]}
        members.append(Muon([group], lr=lr, momentum=momentum, weight_decay=weight_decay))
    if others:
        members.append(adamw(others, lr=lr, betas=betas, eps=eps, weight_decay=weight_decay, decay_all=decay_all))
    return members[0] if len(members) == 1 else Together(members)


def set_learning_rate(optimizer: torch.optim.Optimizer, lr: float) -> None:
    """Set the learning rate of every group for the next step."""
    for group in optimizer.param_groups:
        group["lr"] = lr
