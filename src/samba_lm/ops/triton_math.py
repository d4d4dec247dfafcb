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


def _splat_conditions() -> None:
    """Mend the interpreter of Triton 3.9: it gives a scalar condition the type of what was compared and spreads it over
    a block as a number of that type, which is then refused as a mask."""
    from triton.runtime.interpreter import InterpreterBuilder, TensorHandle

    plain = InterpreterBuilder.create_splat

    def create_splat(self, block_type, scalar):
        if scalar.data.dtype == bool and scalar.dtype != tl.int1:
            scalar = TensorHandle(scalar.data, tl.int1)
        return plain(self, block_type, scalar)

    InterpreterBuilder.create_splat = create_splat


if INTERPRETED:
    _splat_conditions()


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


@triton.jit
def dot(a, b, acc=None):
    """a @ b (+ acc), accumulated in fp32; fp32 operands are multiplied in fp32, not tf32."""
    if INLINE:
        return tl.dot(a, b, acc, input_precision="ieee")
    else:  # the interpreter holds bf16 as integers, and would multiply those
        return tl.dot(a.to(tl.float32), b.to(tl.float32), acc, input_precision="ieee")


@triton.jit
def recomputed_exp2(x):
    """:func:`exp2` that the compiler may not merge with an earlier one of the same argument, to save the registers."""
    if INLINE:
        return tl.inline_asm_elementwise("ex2.approx.ftz.f32 $0, $1;", "=f,f", [x], tl.float32, False, 1)
    else:
        return tl.exp2(x)


@triton.jit
def softplus2(x):
    """log2(1 + e^x), fp32, relative error 2^-22 everywhere, and e^-|x|.

    log2(1 + w) of w = e^-|x| is w times a polynomial (minimax on [0, 1]): the special-function logarithm has an
    absolute error of 2^-22 near 1, which is 1e-3 of a step of 1e-4. softplus(x) is ln 2 times this.
    """
    w = exp2(tl.abs(x) * -1.4426950408889634)
    p = w * 0.007549080532044172 + -0.042566657066345215
    p = w * p + 0.11285553127527237
    p = w * p + -0.19711840152740479
    p = w * p + 0.27564114332199097
    p = w * p + -0.3584083914756775
    p = w * p + 0.48069295287132263
    p = w * p + -0.7213401794433594
    p = w * p + 1.4426950216293335
    return tl.maximum(x, 0.0) * 1.4426950408889634 + w * p, w
