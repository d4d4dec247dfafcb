"""A model and its optimizer as a recipe asks for them, ready for steps."""

from __future__ import annotations

import torch

from samba_lm.model import SambaLM
from samba_lm.ops.linear.float8 import require_float8
from samba_lm.train.optim import build_optimizer
from samba_lm.train.parallel import Parallel
from samba_lm.train.recipe import TrainSection
from samba_lm.train.transforms import checkpoint_activations, compile_layers, remake_cheap_activations, use_float8


def prepare_model(model: SambaLM, settings: TrainSection, parallel: Parallel) -> SambaLM:
    """Use float8, checkpoint activations, compile, then place the model, as the settings say. In place; returns it.

    Raises UserError where the device multiplies no float8 numbers.
    """
    if settings.float8:
        require_float8(parallel.device)
        use_float8(model.layers)
    if settings.activation_checkpointing == "full":
        checkpoint_activations(model.layers)
    elif settings.activation_checkpointing == "selective":
        remake_cheap_activations(model.layers)
    if settings.compile:
        compile_layers(model.layers)
    dtype = getattr(torch, settings.dtype)
    parallel.wrap(model, dtype)
    model.compute_dtype = dtype
    return model


def make_optimizer(model: SambaLM, settings: TrainSection) -> torch.optim.Optimizer:
    """The settings' optimizer for a model that :func:`prepare_model` has placed."""
    return build_optimizer(
        model,
        lr=settings.lr,
        betas=settings.betas,
        eps=settings.eps,
        weight_decay=settings.weight_decay,
        decay_all=settings.decay_all,
        momentum=settings.momentum if settings.optimizer == "muon" else None,
    )
