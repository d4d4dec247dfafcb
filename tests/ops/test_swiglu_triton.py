"""The SwiGLU kernels against the definition in fp64, alone and with the projection that follows."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from kernels import DEVICE, needs_triton
from products import products
from tolerances import assert_close
from torch._dynamo.testing import CompileCounterWithBackend

from samba_lm.ops.swiglu import swiglu, swiglu_linear

pytestmark = needs_triton
COMPILER = "inductor" if DEVICE == "cuda" else "aot_eager"
LOW = [torch.bfloat16, torch.float16, torch.float32]


def compare(op: Callable[..., torch.Tensor], inputs: dict[str, torch.Tensor], dtype: torch.dtype) -> None:
    """Run by kernel in ``dtype`` and by definition in fp64 on the same rounded numbers; values and gradients."""
    results, pull = [], None
    for backend, wide in (("reference", torch.float64), ("triton", dtype)):
        given = [t.to(dtype).to(wide).requires_grad_() for t in inputs.values()]
        y = op(*given, backend=backend)
        if pull is None:
            pull = torch.randn(y.shape, device=DEVICE).to(dtype)
        results.append([y, *torch.autograd.grad(y, given, pull.to(wide))])
    for name, actual, expected in zip(["y", *inputs], results[1], results[0], strict=True):
        assert actual.dtype == dtype
        assert_close(actual, expected, name, dtype, scale=2.0)


def random(*shape: int) -> torch.Tensor:
    return 2 * torch.randn(shape, device=DEVICE)


@pytest.mark.parametrize("dtype", LOW, ids=str)
@pytest.mark.parametrize("shape", [(1, 1), (2, 5, 24), (7, 100), (3, 2060)])
def test_swiglu(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    compare(swiglu, {"gate": random(*shape), "up": random(*shape)}, dtype)


@pytest.mark.parametrize("dtype", LOW, ids=str)
@pytest.mark.parametrize(("rows", "width", "out"), [((1,), 1, 1), ((2, 5), 24, 7), ((9,), 100, 33)])
def test_swiglu_linear(rows: tuple[int, ...], width: int, out: int, dtype: torch.dtype) -> None:
    compare(swiglu_linear, {"gate_up": random(*rows, 2 * width), "weight": random(out, width)}, dtype)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", LOW, ids=str)
@pytest.mark.parametrize(("rows", "width"), [((2, 1031), 4096), ((517,), 8192), ((999,), 5461)])
def test_large(rows: tuple[int, ...], width: int, dtype: torch.dtype) -> None:
    compare(swiglu, {"gate": random(*rows, width), "up": random(*rows, width)}, dtype)
    compare(swiglu_linear, {"gate_up": random(*rows, 2 * width), "weight": random(96, width)}, dtype)


def test_halves_of_a_projection_are_read_where_they_lie() -> None:
    both = random(2, 3, 48)
    gate, up = both.chunk(2, dim=-1)
    for g, u in ((gate, up), (gate[:, ::2], up[:, ::2]), (both[..., ::2], both[..., 1::2])):
        assert_close(swiglu(g, u, backend="triton"), swiglu(g, u, backend="reference"), "y")


def test_gates_far_out_are_shut_or_open() -> None:
    gate = torch.tensor([[-80.0, 80.0, 0.0, -30.0]], device=DEVICE, requires_grad=True)
    y = swiglu(gate, torch.ones_like(gate), backend="triton")
    assert_close(y.detach(), torch.tensor([[0.0, 80.0, 0.0, 0.0]], device=DEVICE), "y")
    (grad,) = torch.autograd.grad(y.sum(), gate)
    assert_close(grad, torch.tensor([[0.0, 1.0, 0.5, 0.0]], device=DEVICE), "gradient")


def test_only_the_arguments_are_kept() -> None:
    saved: list[torch.Tensor] = []
    gate_up, weight = random(3, 32).requires_grad_(), random(8, 16).requires_grad_()
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        swiglu_linear(gate_up, weight, backend="triton")
        assert {t.data_ptr() for t in saved} == {gate_up.data_ptr(), weight.data_ptr()}
        saved.clear()
        with torch.no_grad():
            swiglu_linear(gate_up, weight, backend="triton")
    assert not saved


@pytest.mark.parametrize("compiled", [False, True])
def test_of_a_frozen_weight_no_gradient_is_computed(compiled: bool) -> None:
    gate_up, weight, down = random(3, 32).requires_grad_(), random(8, 16).requires_grad_(), random(3, 8)

    def plain(gate_up: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        return swiglu_linear(gate_up, weight, backend="triton")

    run = torch.compile(plain, backend="aot_eager") if compiled else plain
    (wanted,) = torch.autograd.grad(plain(gate_up, weight), gate_up, down)

    def backward(weight: torch.Tensor) -> None:
        gate_up.grad = None
        run(gate_up, weight).backward(down)
        assert gate_up.grad is not None
        assert torch.equal(gate_up.grad, wanted)

    assert products(lambda: backward(weight)) == 3
    assert products(lambda: backward(weight.detach())) == 2


def test_operators_keep_their_registrations() -> None:
    from samba_lm.ops.swiglu import triton

    gate, up = (random(2, 3, 24).requires_grad_() for _ in range(2))
    torch.library.opcheck(triton._swiglu, (gate, up))
    torch.library.opcheck(triton._swiglu, tuple(random(2, 48).chunk(2, dim=-1)))
    torch.library.opcheck(triton._swiglu_linear, (random(2, 3, 48).requires_grad_(), random(5, 24).requires_grad_()))
    torch.library.opcheck(triton._swiglu_backward_and_again, (random(2, 3, 48), random(2, 3, 24), True))
    torch.library.opcheck(triton._swiglu_backward_and_again, (random(2, 3, 48), random(2, 3, 24), False))


def test_one_graph_for_all_lengths() -> None:
    torch.compiler.reset()
    counter = CompileCounterWithBackend(COMPILER)
    weight = torch.randn(96, 256, device=DEVICE, requires_grad=True)

    def block(x: torch.Tensor) -> torch.Tensor:
        return swiglu_linear(x, weight, backend="triton") + 1

    compiled = torch.compile(block, fullgraph=True, dynamic=True, backend=counter)
    for length in (64, 77, 200):
        gate_up: Any = torch.randn(2, length, 512, device=DEVICE, requires_grad=True)
        y = compiled(gate_up)
        expected = block(gate_up)
        assert_close(y.detach(), expected.detach(), "y", torch.float32, scale=5.0)
        for actual, plain in zip(
            torch.autograd.grad(y.sum(), (gate_up, weight)),
            torch.autograd.grad(expected.sum(), (gate_up, weight)),
            strict=True,
        ):
            assert_close(actual, plain, "gradient", torch.float32, scale=5.0)
    assert counter.frame_count == 1
