"""Which parameters are matrices to Muon, and which maps stand in one on top of each other."""

from __future__ import annotations

from torch import nn

from samba_lm.mixers.attention import AttentionMixer
from samba_lm.mixers.mamba import S6, MambaMixer
from samba_lm.mixers.mega import MegaS6Mixer
from samba_lm.mixers.mlp import SwiGLUMLP
from samba_lm.nn.linear import Linear


def matrices(model: nn.Module) -> dict[str, tuple[int, ...]]:
    """The weights of the linear maps, by name, and the rows of the maps that each is made of.

    Not the embedding and the head, whose rows are looked up one by one, nor what is 2-D and no map: taps of
    convolutions, A_log.
    """
    found: dict[str, tuple[int, ...]] = {}
    for name, module in model.named_modules():
        prefix = f"{name}." if name else ""
        if isinstance(module, Linear | nn.Linear):
            found.setdefault(f"{prefix}weight", (module.weight.shape[0],))
        for child, rows in _stacked(module).items():  # named_modules gives a module before those in it
            found[f"{prefix}{child}.weight"] = rows
    return found


def _stacked(module: nn.Module) -> dict[str, tuple[int, ...]]:
    """The fused maps of one module, as the comments where they are made say."""
    if isinstance(module, MambaMixer):
        inner = module.in_proj.weight.shape[0] // 2
        return {"in_proj": (inner, inner)}
    if isinstance(module, S6):
        return {"x_proj": (module.rank, module.state, module.state)}
    if isinstance(module, AttentionMixer):
        keys = module.spec.groups * module.head_dim
        return {"qkv": (module.spec.heads * module.head_dim, keys, keys)}
    if isinstance(module, SwiGLUMLP):
        width = module.w12.weight.shape[0] // 2
        return {"w12": (width, width)}
    if isinstance(module, MegaS6Mixer):
        width, z = module.width, module.spec.z_dim
        return {"mx_proj": (width, z, width, width)}
    return {}
