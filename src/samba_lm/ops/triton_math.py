"""Elementwise functions for the Triton kernels: one special-function instruction each where the GPU has one.

``INLINE`` chooses between inline assembly and the plain twin that the interpreter can run.
"""

# mypy: allow-untyped-defs, allow-untyped-calls
from __future__ import annotations

import triton
import triton.language as tl

from samba_lm.ops.backend import INTERPRETED

INLINE = tl.constexpr(not INTERPRETED)
LOG2_E = tl.constexpr(1.4426950408889634)
LN_2 = tl.constexpr(0.6931471805599453)


@triton.jit
def exp2(x):
    """2^x, fp32, relative error 2^-22."""
    if INLINE:
        return tl.inline_asm_elementwise("ex2.approx.ftz.f32 $0, $1;", "=f,f", [x], tl.float32, True, 1)
    else:
        return tl.exp2(x)


@triton.jit
def log2(x):
    """log2(x), fp32, absolute error 2^-22 near 1."""
    if INLINE:
        return tl.inline_asm_elementwise("lg2.approx.ftz.f32 $0, $1;", "=f,f", [x], tl.float32, True, 1)
    else:
        return tl.log2(x)


@triton.jit
def reciprocal(x):
    """1/x, fp32, relative error 2^-23."""
    if INLINE:
        return tl.inline_asm_elementwise("rcp.approx.ftz.f32 $0, $1;", "=f,f", [x], tl.float32, True, 1)
    else:
        return 1.0 / x


@triton.jit
def sigmoid(x):
    """1 / (1 + e^-x), fp32; exact 0 and 1 far out."""
    return reciprocal(1.0 + exp2(x * -LOG2_E))  # constant second: the interpreter multiplies constexpr * tensor wrongly


@triton.jit
def silu(x):
    """x sigmoid(x), fp32."""
    return x * sigmoid(x)
