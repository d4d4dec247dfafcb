"""What does not fit together is told in one line, before a kernel could read past the end of a tensor."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from kernels import DEVICE, needs_triton

from samba_lm.errors import UserError
from samba_lm.ops.causal_conv1d import causal_conv1d, causal_conv1d_step
from samba_lm.ops.linear_cross_entropy import linear_cross_entropy
from samba_lm.ops.rms_norm import add_rms_norm, rms_norm
from samba_lm.ops.rope import rotate_split
from samba_lm.ops.selective_scan import selective_scan, selective_scan_step
from samba_lm.ops.sliding_attention import attend_one, sliding_attention
from samba_lm.ops.swiglu import swiglu, swiglu_linear

Inputs = dict[str, Any]
BACKENDS = ["auto", pytest.param("triton", marks=needs_triton)]


def r(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, device=DEVICE)


def whole(*shape: int) -> torch.Tensor:
    return torch.zeros(*shape, dtype=torch.int64, device=DEVICE)


def scan() -> Inputs:
    rows = {name: r(2, 5, 8) for name in ("u", "delta", "z")} | {name: r(2, 5, 16) for name in "BC"}
    resets = whole(2, 5).bool()
    fixed = {"A": -r(8, 16).abs(), "D": r(8), "delta_bias": r(8), "state": r(2, 8, 16)}
    return {**rows, **fixed, "resets": resets, "lengths": whole(2)}


def scan_step() -> Inputs:
    rows = {name: r(2, 8) for name in ("u", "delta", "z")} | {name: r(2, 16) for name in "BC"}
    return {**rows, "A": -r(8, 16).abs(), "D": r(8), "delta_bias": r(8), "state": r(2, 8, 16)}


def attention() -> Inputs:
    given = {"q": r(2, 5, 4, 16), "k": r(2, 7, 2, 16), "v": r(2, 7, 2, 16)}
    return {**given, "q_documents": whole(2, 5), "k_documents": whole(2, 7), "window": 3}


def dtypes(**inputs: Any) -> Inputs:
    return {**inputs, "eps": 1e-5, "dtype": torch.float32}


OPERATIONS: list[tuple[Callable[..., Any], Callable[[], Inputs]]] = [
    (selective_scan, scan),
    (selective_scan_step, scan_step),
    (
        causal_conv1d,
        lambda: {
            "x": r(2, 5, 8),
            "weight": r(8, 4),
            "bias": r(8),
            "state": r(2, 3, 8),
            "positions": whole(2, 5),
            "lengths": whole(2),
        },
    ),
    (causal_conv1d_step, lambda: {"x": r(2, 8), "weight": r(8, 4), "bias": r(8), "state": r(2, 3, 8)}),
    (sliding_attention, attention),
    (
        attend_one,
        lambda: {"q": r(2, 4, 16), "k": r(2, 6, 2, 16), "v": r(2, 6, 2, 16), "filled": whole(2, 6) == 0},
    ),
    (rms_norm, lambda: {"x": r(3, 8), "weight": r(8)}),
    (add_rms_norm, lambda: dtypes(x=r(3, 8), branch=r(3, 8), weight=r(8))),
    (swiglu, lambda: {"gate": r(3, 8), "up": r(3, 8)}),
    (swiglu_linear, lambda: {"gate_up": r(3, 16), "weight": r(4, 8)}),
    (
        rotate_split,
        lambda: {"qkv": r(2, 5, 8 * 6), "cos": r(2, 5, 1, 3), "sin": r(2, 5, 1, 3), "heads": 4, "groups": 2},
    ),
    (linear_cross_entropy, lambda: {"hidden": r(5, 8), "weight": r(32, 8), "targets": whole(5)}),
]

FREE = {
    *(("rms_norm", "x", 0), ("swiglu_linear", "gate_up", 0), ("swiglu_linear", "weight", 0)),
    *(("linear_cross_entropy", "weight", 0), ("sliding_attention", "v", 3), ("attend_one", "v", 3)),
}
"""Dims of any size."""


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(("operation", "make"), OPERATIONS, ids=[op.__name__ for op, _ in OPERATIONS])
def test_every_tensor_must_fit_the_others(
    operation: Callable[..., Any], make: Callable[[], Inputs], backend: str
) -> None:
    given = make()
    operation(**given, backend=backend)
    tensors = {name: t for name, t in given.items() if isinstance(t, torch.Tensor)}
    for name, tensor in tensors.items():
        for dim in range(tensor.dim()):
            if (operation.__name__, name, dim) in FREE:
                continue
            longer = torch.cat((tensor, tensor.narrow(dim, 0, 1)), dim)
            for other in (longer, tensor.narrow(dim, 0, tensor.shape[dim] - 1)):
                if name == "positions" and other.shape[0] == 1:
                    continue  # one row for all
                with pytest.raises(UserError, match=operation.__name__):
                    operation(**{**given, name: other}, backend=backend)
        with pytest.raises(UserError, match=operation.__name__):
            operation(**{**given, name: tensor.to("meta")}, backend=backend)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    ("operation", "make", "name", "wrong"),
    [
        (selective_scan, scan, "u", lambda: whole(2, 5, 8)),
        (selective_scan, scan, "resets", lambda: whole(2, 5)),
        (selective_scan, scan, "lengths", lambda: whole(2).int()),
        (sliding_attention, attention, "window", lambda: 0),
        (sliding_attention, attention, "k_documents", lambda: None),
        (swiglu, lambda: {"gate": r(3, 8)}, "up", lambda: r(3, 8).bfloat16()),
        (linear_cross_entropy, lambda: {"hidden": r(5, 8), "weight": r(32, 8)}, "targets", lambda: whole(5).int()),
        (rotate_split, lambda: {"cos": r(1, 5, 1, 3), "sin": r(1, 5, 1, 3), "heads": 4, "groups": 2}, "qkv",
         lambda: r(2, 5, 8 * 7)),
    ],
)  # fmt: skip
def test_what_else_kernels_cannot_read(
    operation: Callable[..., Any], make: Callable[[], Inputs], name: str, wrong: Callable[[], Any], backend: str
) -> None:
    with pytest.raises(UserError, match=operation.__name__):
        operation(**{**make(), name: wrong()}, backend=backend)


@pytest.mark.parametrize("backend", BACKENDS)
def test_nothing_gives_nothing(backend: Any) -> None:
    given = scan()
    state = given["state"].requires_grad_()
    empty = {name: t[:, :0] if name in ("u", "delta", "z", "B", "C", "resets") else t for name, t in given.items()}
    y, final = selective_scan(**empty, backend=backend)
    assert y.shape == (2, 0, 8)
    assert torch.equal(final, state)
    assert final is not state
    final.sum().backward()
    assert torch.equal(state.grad, torch.ones_like(state))
    q, kv = r(2, 0, 4, 16), r(2, 3, 2, 16)
    assert sliding_attention(q, kv, kv, window=2, backend=backend).shape == (2, 0, 4, 16)


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_window_may_be_wider_than_any_text(backend: Any) -> None:
    q, kv = r(1, 5, 2, 16), r(1, 5, 1, 16)
    wide = sliding_attention(q, kv, kv, window=10**15, backend=backend)
    torch.testing.assert_close(wide, sliding_attention(q, kv, kv, window=None, backend=backend))


@pytest.mark.parametrize("backend", BACKENDS)
def test_heads_of_an_odd_width_are_split_where_nothing_is_rotated(backend: Any) -> None:
    qkv = r(2, 3, 8 * 5)
    q, k, v = rotate_split(qkv, None, None, 4, 2, backend=backend)
    assert torch.equal(torch.cat((q, k, v), 2).flatten(2), qkv)
