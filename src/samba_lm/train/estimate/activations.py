"""What a layer keeps for its backward, bytes a token, in closed form.

It is what the GPU's kernels keep: tests count the tensors that autograd saves, at full size, without a GPU. Mixers
that have no kernels of ours (GLA, retention, Mega's attention over chunks) are what PyTorch's path keeps, by a fit to
such counts; with flash-linear-attention the first two keep less.
"""

from __future__ import annotations

from dataclasses import dataclass

from samba_lm.config import (
    Attention,
    GatedLinearAttention,
    GatedParallel,
    LayerSpec,
    Mamba,
    MegaS6,
    ModelConfig,
    Retention,
    SwiGLU,
    TwoPaths,
)

SCAN_TILE = 16
"""Tokens between two states that the scan keeps."""
CHUNK = 16
"""Tokens of a chunk in PyTorch's path of GLA and retention: between two states that it keeps."""
BLOCK = 256
"""Queries of a block in PyTorch's path of attention."""


@dataclass(frozen=True)
class Kept:
    """Bytes a token."""

    layer: int
    """With nothing made again."""
    remade: int
    """Of these, what `selective` makes again."""
    inputs: int
    """All that `full` keeps."""
    backward: int
    """Gradients that are there at once in this layer's backward."""


def kept(spec: LayerSpec, d_model: int, size: int) -> Kept:
    """Of one layer with its norm; ``size``: bytes of a number that layers compute with (2 or 4)."""
    D = d_model
    norm = size * D + 4 if spec.pre_norm else 0  # total / rms, and 1 / rms
    own = size * D + _own(spec, D, size) if spec.pre_norm else _own(spec, D, size)
    remade = sum(size * part.inner(D) for part in spec.parts() if isinstance(part, Mamba))
    # The residual stream is fp32 in and out; the branch comes in.
    backward = 4 * D + size * D + _backward(spec, D, size)
    return Kept(norm + own, remade, 4 * D, backward)


def _own(spec: LayerSpec, D: int, size: int) -> int:
    """Without the norm and what it gives, which the first product keeps."""
    match spec:
        case SwiGLU():
            return size * 2 * spec.width  # gate and up; their product is made again
        case Mamba():
            E = spec.inner(D)
            # h and gate, u, delta, y; low, B and C; the states that the scan keeps.
            return size * (5 * E + spec.rank(D) + 2 * spec.state) + 4 * E * spec.state // SCAN_TILE
        case Attention():
            before = size * spec.qkv_width(D) if spec.short_conv else 0
            return before + size * (spec.qkv_width(D) + D) + 4 * spec.heads  # q, k, v, out, log-sum-exp
        case GatedLinearAttention():
            keys, values = spec.key_dim(D), spec.value_dim(D)
            return 8 * D + 136 * keys + 6 * values + 5 * keys * values // (CHUNK * spec.heads)
        case Retention():
            keys, values = spec.key_dim(D), spec.value_dim(D)
            return 6 * D + 8 * values + 4750 * keys * values // (1000 * CHUNK * spec.heads)
        case MegaS6():
            window = (spec.chunk + BLOCK - 1) * 4 * (D + 2 * spec.z_dim + BLOCK) // BLOCK
            return window + size * (17 * D + 10 * spec.z_dim) + 4 * D
        case TwoPaths():
            E = spec.mamba.inner(D)
            gate = size * (2 * D + spec.rank(D)) if isinstance(spec, GatedParallel) else 0
            return _own(spec.mamba, D, size) + _own(spec.attention, D, size) + size * (E + 2 * D) + gate
        case _:  # a mixer of somebody's own: as wide as attention
            return size * 4 * D


def _backward(spec: LayerSpec, D: int, size: int) -> int:
    match spec:
        case SwiGLU():
            return size * 4 * spec.width  # of gate and up, of their product, and the product again
        case Mamba():
            return size * 5 * spec.inner(D)  # of y, delta, u, h and gate
        case Attention():
            return size * (2 * spec.qkv_width(D) + D)
        case TwoPaths():
            return _backward(spec.mamba, D, size) + _backward(spec.attention, D, size)
        case MegaS6():
            return _own(spec, D, size) // 3
        case _:  # what was kept goes as the gradients come
            return max(size * 4 * D, _own(spec, D, size) // 8)


def rotation(config: ModelConfig) -> int:
    """Bytes a token of the rotation's angles, which all attention layers and rows share."""
    heads = [part for spec in config.layers for part in spec.parts() if isinstance(part, Attention) and part.rope]
    return 4 * max((part.head_dim(config.d_model) for part in heads), default=0)
