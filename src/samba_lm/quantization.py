"""A model with its large weights in 8 or 4 bits a number, made from a loaded one: less memory, faster decoding."""

from __future__ import annotations

from typing import get_args

import torch

from samba_lm.errors import UserError
from samba_lm.mixers.mamba import S6
from samba_lm.model import SambaLM
from samba_lm.nn.linear import Linear
from samba_lm.nn.quantized import QuantizedLinear
from samba_lm.ops.quantized_linear.reference import Kind

KINDS: tuple[str, ...] = get_args(Kind)
THIN = 4
"""A map with fewer than d_model / THIN inputs or outputs stays as it is: it costs little, and much follows from it."""


@torch.no_grad()
def quantize(model: SambaLM, kind: str) -> SambaLM:
    """Replace the large linear maps of a model's layers by quantised ones, in place; returns the model.

    ``kind``: "int8", a scale for each output; "int4", a scale for every 64 inputs of each output. The embedding, the
    head, norms, convolutions, and what makes a Mamba layer's step, B and C stay as they are. Place the model on its
    device and give it its dtype first. It cannot be trained or saved any more: keep the checkpoint.

    Raises UserError for another kind, and for a model that is quantised already.
    """
    if kind not in KINDS:
        raise UserError(f"There is no quantisation {kind!r}: choose {' or '.join(KINDS)}.")
    if model.quantized is not None:
        raise UserError(f"The model is {model.quantized} already: load it again to make it {kind}.")
    chosen: Kind = "int8" if kind == "int8" else "int4"
    thin = model.config.d_model / THIN
    for layer in model.layers:
        kept = {id(part) for module in layer.modules() if isinstance(module, S6) for part in module.modules()}
        for parent in list(layer.modules()):
            for name, module in list(parent.named_children()):
                if isinstance(module, Linear) and id(module) not in kept and min(module.weight.shape) >= thin:
                    setattr(parent, name, QuantizedLinear(module, chosen))
    model.quantized = chosen
    return model.requires_grad_(False).eval()


def weight_bytes(model: SambaLM) -> int:
    """Bytes that a model's parameters and buffers take, quantised or not."""
    tensors = {id(t): t for t in [*model.parameters(), *model.buffers()]}
    return sum(t.numel() * t.element_size() for t in tensors.values())
