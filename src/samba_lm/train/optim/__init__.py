"""Optimizers: AdamW, Muon, what decays, and their state by the parameters' names."""

from samba_lm.train.optim.adamw import decays
from samba_lm.train.optim.build import build_optimizer, set_learning_rate
from samba_lm.train.optim.state import load_optimizer_tensors, optimizer_tensors

__all__ = [
    "build_optimizer",
    "decays",
    "load_optimizer_tensors",
    "optimizer_tensors",
    "set_learning_rate",
]
